"""Files and folders that appear whole or not at all, small JSON files, and the cache folder.

What is written is made inside a hidden sibling of its place, reaches the disk, and is put in place
by one rename. A writer holds a lock on a file in its hidden folder, and the kernel drops the lock
when the process ends, however it ends. So a hidden folder whose lock is free has no living writer
and is removed by the next write, while one that is locked is left alone, however old it is.

A file that is read is input, whatever it contains: every failure is a one-line `ValueError` that
names the file.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

LOCK = ".lock"
LIMIT = 256 * 2**20
"""No tokenizer or index comes near this; a larger file is not what its name says."""


def cache_folder() -> Path:
    """All that we may recreate: $JAXINFER_CACHE, $XDG_CACHE_HOME/jaxinfer or ~/.cache/jaxinfer."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("JAXINFER_CACHE") or f"{base}/jaxinfer"))


def shipped_folder(name: str) -> Path | None:
    """A folder that comes with the library: of the source tree, or installed beside the modules."""
    package = Path(__file__).resolve().parent
    return next((x / name for x in (package.parent, package) if (x / name).is_dir()), None)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write a file to; it becomes `path` when the block ends without an error.

    The name keeps the ending, by which writers such as matplotlib choose a format. Folders on the
    way are made. A reader sees the old file or the new one; an error leaves the old one.
    """
    path = Path(path).absolute()
    with partial_folder(path, "writing") as temporary:
        content = temporary / f"new{path.suffix}"
        yield content
        _flush(content)
        os.replace(content, path)


@contextlib.contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends without an error.

    A reader sees the old folder, the new one, or for the moment between two renames none; never a
    half-written one.
    """
    folder = Path(folder).absolute()
    with partial_folder(folder, "writing") as temporary:
        content = temporary / "new"
        content.mkdir()
        yield content
        _flush_folder(content)
        if folder.exists():
            os.rename(folder, temporary / "old")
        os.rename(content, folder)


def check_destination(folder: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """Raises unless `folder` is absent, empty or what may be replaced.

    Args:
      folder: where a folder is to be written.
      is_ours: whether a folder that is there holds an older version of what is to be written.
      what: what that is, for the error, such as "a draft".
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} exists and is not a folder; choose another destination")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise ValueError(f"{folder} exists and is not {what}; choose another destination")
    above = next((p for p in folder.absolute().parents if p.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{above} is not a folder; choose another destination than {folder}")


def write_text(path: str | Path, text: str) -> None:
    """Puts `text` into the file `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Puts an indented JSON object into the file `path` in one step."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error on one line, shortened, for use inside another message.

    Characters that are not printable become escapes: a terminal obeys some of them, and the text
    may come from a file.
    """
    start = str(error)[: 8 * limit]  # enough to fill the line; the rest may be megabytes
    text = "".join(c if c.isprintable() else _escaped(c) for c in " ".join(start.split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(name: object, limit: int = 80) -> str:
    """The `repr` of a name that comes from a file, on one line and shortened, for a message."""
    return one_line(repr(name[: 4 * limit] if isinstance(name, str) else name), limit)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def read_text(path: Path, limit: int = LIMIT) -> str:
    """The UTF-8 text of a file of at most `limit` bytes."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            raise ValueError(f"{path} is not a regular file")
        if found.st_size > limit:
            raise ValueError(
                f"{path} has {found.st_size} bytes; at most {limit} are expected there"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {one_line(error)}") from error


def parse_json(text: str | bytes, what: object) -> Any:
    """Parsed JSON; `what` names the source in errors."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {one_line(error)}") from error


def read_json(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; parsed, it may take 25 times that."""
    data = parse_json(read_text(path, limit), path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


@contextlib.contextmanager
def partial_folder(place: Path, activity: str) -> Iterator[Path]:
    """A new hidden sibling of the file or folder `place` that is gone when the block ends."""
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place, activity)
    path, lock = _new(place, activity)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_leftovers(place: Path, activity: str) -> None:
    """Remove the partial folders of `place` whose writers were killed."""
    pattern = glob.escape(_prefix(place, activity)) + "*"
    for path in place.parent.glob(pattern):
        with contextlib.suppress(OSError), _opened(path / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


def _new(place: Path, activity: str) -> tuple[Path, int]:
    """A partial folder and the descriptor that locks it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_prefix(place, activity), dir=place.parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            with contextlib.suppress(OSError):  # a file system without locks keeps its leftovers
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                return path, lock
            os.close(lock)
        # another run took the folder for a leftover before the lock was ours: make another


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _prefix(place: Path, activity: str) -> str:
    return f".{place.name}.{activity}-"


def _flush_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)


def _flush(path: Path) -> None:
    """Reach the disk before the rename does, so that a power cut cannot leave an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
