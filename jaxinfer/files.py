"""Files and folders that appear whole or not at all, small JSON files, and the cache folder.

What is written is made inside a hidden sibling of its place, reaches the disk, and is put in place
by one rename. A writer locks its hidden folder, and the kernel drops the lock when the process
ends, however it ends. So a hidden folder that nobody locks has no living writer: the next write
beside it removes it, after what it had moved aside has returned to its place. A link is never
followed, neither in the place of what is written nor among the hidden folders.

A file that is read is input, whatever it contains: every failure is a one-line `ValueError` that
names the file.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PARTIAL = ".jaxinfer-writing-"  # and 8 characters
NEW, OLD = "new", "old"  # folders in it, with what is made, or was moved aside, under its own name
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
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

    Raises:
      ValueError: at `path` is something else than a file: a folder, a device, a link.
    """
    path = Path(path).absolute()
    _check_place(path, "a file")
    with partial_folder(path) as temporary:
        content = temporary / NEW / path.name
        content.parent.mkdir()
        yield content
        _flush(content)
        os.replace(content, path)
        _flush_names(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends without an error.

    A reader sees the old folder or the new one, never a half-written one. Where the file system
    cannot exchange two folders it sees none for the moment between two renames; a process that is
    killed in that moment leaves the old one to `remove_leftovers`.
    """
    folder = Path(folder).absolute()
    _check_place(folder, "a folder")
    with partial_folder(folder) as temporary:
        content = temporary / NEW / folder.name
        content.mkdir(parents=True)
        yield content
        _flush_folder(content)
        put_in_place(content, folder, temporary)


def put_in_place(content: Path, folder: Path, temporary: Path) -> None:
    """Moves the finished folder `content`, made in the partial folder `temporary`, to `folder`."""
    if os.path.lexists(folder) and _exchange(content, folder):
        return _flush_names(folder.parent)
    if os.path.lexists(folder):
        (temporary / OLD).mkdir()
        os.rename(folder, temporary / OLD / folder.name)
    os.rename(content, folder)
    _flush_names(folder.parent)


def check_destination(
    folder: Path, is_ours: Callable[[Path], bool], what: str, *, overwrite: bool
) -> None:
    """Raises unless `folder` is absent, empty or what may be replaced.

    Args:
      folder: where a folder is to be written.
      is_ours: whether a folder that is there holds an older version of what is to be written.
      what: what that is, for the error, such as "a draft".
      overwrite: whether such an older version may be replaced; nothing else ever is.
    """
    _check_place(folder, "a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not is_ours(folder):
            raise ValueError(f"{folder} exists and is not {what}; choose another destination")
        if not overwrite:
            raise ValueError(
                f"{folder} holds {what} already; choose another destination, or replace it with "
                "overwrite=True (--force)"
            )
    above = next((p for p in folder.absolute().parents if p.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{above} is not a folder; choose another destination than {folder}")


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Raises where there is a file already that may not be replaced."""
    if path.is_file() and not overwrite:
        raise ValueError(f"{path} exists; choose another file, or replace it with --force")


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
    name = one_line(path, 1000)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            raise ValueError(f"{name} is not a regular file")
        if found.st_size > limit:
            raise ValueError(
                f"{name} has {found.st_size} bytes; at most {limit} are expected there"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror or one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {one_line(error)}") from error


def parse_json(text: str | bytes, what: object) -> Any:
    """Parsed JSON; `what` names the source in errors."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{one_line(what, 1000)} is not valid JSON: {one_line(error)}") from error


def read_json(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; parsed, it may take 25 times that."""
    data = parse_json(read_text(path, limit), path)
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise ValueError(f"{one_line(path, 1000)} holds a JSON {kind}, expected an object")
    return data


@contextlib.contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A new hidden sibling of the file or folder `place` that is gone when the block ends."""
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place.parent)
    path, lock = _new(place.parent)
    try:
        yield path
    except OSError as error:
        # a full disk says no name, and others one that nobody has heard of
        is_ours = error.filename is None or str(error.filename).startswith(str(path))
        if is_ours and error.errno is not None:
            error.filename = str(place)
        raise
    finally:
        _remove(path)
        os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers have left in `folder`; what they had moved aside returns."""
    for path in folder.glob(f"{PARTIAL}????????"):
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)


def _remove(partial: Path) -> None:
    aside = partial / OLD
    for old in () if aside.is_symlink() else aside.glob("*"):
        place = partial.parent / old.name
        if not os.path.lexists(place):  # the end came between two renames
            with contextlib.suppress(OSError):
                os.rename(old, place)
    shutil.rmtree(partial, ignore_errors=True)


def _new(parent: Path) -> tuple[Path, int]:
    """A partial folder and the descriptor that locks it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            with contextlib.suppress(OSError):  # a file system without locks keeps its leftovers
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                return path, lock
            os.close(lock)
        # another run took the folder for a leftover before the lock was ours: make another


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The descriptor of a folder; an OSError where there is none, such as at a link to one."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # no Linux, or an old C library
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def _check_place(place: Path, kind: str) -> None:
    """Raises unless there is nothing at `place`, or what may be replaced by its kind."""
    kinds = {"a link": Path.is_symlink, "a folder": Path.is_dir, "a file": Path.is_file}
    found = next((name for name, holds in kinds.items() if holds(place)), "a device or a pipe")
    if os.path.lexists(place) and found != kind:
        raise ValueError(f"{place} is {found}, not {kind}; choose another destination")


def _flush_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)
        elif path.is_dir():
            _flush_names(path)
    _flush_names(folder)


def _flush(path: Path) -> None:
    """Reach the disk before the rename does, so that a power cut cannot leave an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_names(folder: Path) -> None:
    """The names in a folder reach the disk; some file systems cannot be asked for that."""
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF):
            raise
