"""Points and weights from `.npy` files, which are untrusted."""

import math
import os
import stat
from pathlib import Path

import numpy as np

from jaxinfer.files import one_line

MOST_BYTES = 8 * 2**30
MOST_HEADER = 10_000  # characters; numpy parses it as a literal


def read_points(path: str | Path) -> np.ndarray:
    """The array of a `.npy` file, whose header is held against the file before anything is read.

    Raises:
      ValueError: no such file, not of this format, objects in it (pickles are never read), more
        or fewer bytes than its shape says, or more than `MOST_BYTES`.
    """
    name = one_line(path, 1000)
    try:
        # a pipe without a writer would block, and /dev/zero never end
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{name} is not a regular file; expected an array of numpy.save")
        with open(path, "rb") as file:
            shape, dtype = _header(file, name)
            expected = math.prod(shape) * dtype.itemsize
            there = os.fstat(file.fileno()).st_size - file.tell()
            if there != expected:
                raise ValueError(
                    f"{name}: shape {list(shape)} of {dtype} takes {expected} bytes, the file has "
                    f"{there}; save the array again"
                )
            if expected > MOST_BYTES:
                raise ValueError(
                    f"{name} holds {expected} bytes, at most {MOST_BYTES} are read; take a sample"
                )
            file.seek(0)
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror or one_line(error)}") from error
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _header(file, name: str) -> tuple[tuple[int, ...], np.dtype]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        read = readers[np.lib.format.read_magic(file)]
        shape, _, dtype = read(file, max_header_size=MOST_HEADER)
    except (ValueError, KeyError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        reason = one_line(error, 160)
        raise ValueError(f"{name} is not an array of numpy.save: {reason}") from error
    if dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {one_line(dtype, 40)}, expected float32 or float64")
    if any(length < 0 for length in shape) or math.prod(shape) >= 2**62:
        raise ValueError(f"{name} claims the shape {one_line(list(shape), 80)}; save it again")
    return shape, dtype
