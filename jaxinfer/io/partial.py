"""Partial folders: hidden siblings in which a folder is made before one rename puts it in place.

A writer holds a lock on a file inside its partial folder, and the kernel drops the lock when the
process ends, however it ends. So a partial folder whose lock is free has no living writer and is
removed by the next run, while one that is locked is left alone, however old it is.
"""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


@contextlib.contextmanager
def partial_folder(folder: Path, activity: str) -> Iterator[Path]:
    """A new hidden sibling of `folder` that is gone when the block ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, activity)
    path, lock = _new(folder, activity)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_leftovers(folder: Path, activity: str) -> None:
    """Remove the partial folders of `folder` whose writers were killed."""
    pattern = glob.escape(_prefix(folder, activity)) + "*"
    for path in folder.parent.glob(pattern):
        with contextlib.suppress(OSError), _opened(path / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


def _new(folder: Path, activity: str) -> tuple[Path, int]:
    """A partial folder and the descriptor that locks it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_prefix(folder, activity), dir=folder.parent))
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


def _prefix(folder: Path, activity: str) -> str:
    return f".{folder.name}.{activity}-"
