"""Parsers with faults of every kind that the fuzzer has to find: a damaged file sets each off."""

import json
import os
import time
from pathlib import Path

from tools.fuzz.target import Target

GOOD = b'{"a": 1, "b": [2, 3]}'


def make(folder: Path) -> None:
    (folder / "a.json").write_bytes(GOOD)


def is_good(folder: Path) -> bool:
    return (folder / "a.json").read_bytes() == GOOD


def refuses(folder: Path) -> None:
    if not is_good(folder):
        raise ValueError("a.json is damaged")


def foreign(folder: Path) -> None:
    json.loads((folder / "a.json").read_bytes() if is_good(folder) else b"{")


def traceback(folder: Path) -> None:
    {True: 0}[is_good(folder)]


def escape(folder: Path) -> None:
    if not is_good(folder):
        raise ValueError("\x1b[2J")


def long(folder: Path) -> None:
    if not is_good(folder):
        raise ValueError("x" * 1001)


def hang(folder: Path) -> None:
    while not is_good(folder):
        pass


def wait(folder: Path) -> None:
    if not is_good(folder):
        time.sleep(1000)


def memory(folder: Path) -> None:
    bytearray(1 if is_good(folder) else 3 * 2**30)


def abort(folder: Path) -> None:
    if not is_good(folder):
        os.abort()


def target(parse) -> Target:
    return Target(parse.__name__, make, parse, ("a.json",))
