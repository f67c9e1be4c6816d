"""Messages between the processes of a pipeline, as bytes. No pickle: nothing that arrives is run.

    magic u8[4], header length u32, payload length u64, CRC-32 of header and payload u32
    header   JSON: {"what": WORD, "fields": {NAME: value, ...}, "arrays": [[dtype, [sizes]], ...]}
    payload  the arrays, one behind the other

Numbers are little-endian. What is said about lengths is compared with limits before anything is
allocated, and with each other before anything is used.
"""

import json
import math
import struct
import zlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxinfer.typing import Json

MAGIC = b"JXI1"
HEAD = struct.Struct("<4sIQI")
HEADER_BYTES = 2**16  # of a header, at most
PAYLOAD_BYTES = 2**30  # of the arrays, at most
MOST_ARRAYS, MOST_AXES = 4096, 8
DTYPES = {
    str(np.dtype(kind)): np.dtype(kind)
    for kind in (
        "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float16",
        "float32", "float64", ml_dtypes.bfloat16,
    )
}  # fmt: skip


class BadMessage(ValueError):
    """What arrived is no message."""


class Message(NamedTuple):
    """A word, some named values and some arrays."""

    what: str
    fields: Json
    arrays: tuple[np.ndarray, ...] = ()


class Head(NamedTuple):
    """What comes first of a message: how much follows, and its checksum."""

    header: int
    payload: int
    checksum: int

    @classmethod
    def of(cls, data: bytes, limit: int = PAYLOAD_BYTES) -> "Head":
        """From the first `HEAD.size` bytes.

        Raises:
          BadMessage: it is the beginning of no message, or of one that is too large.
        """
        if len(data) != HEAD.size:
            raise BadMessage(f"a message begins with {HEAD.size} bytes, got {len(data)}")
        magic, header, payload, checksum = HEAD.unpack(data)
        if magic != MAGIC:
            raise BadMessage(f"a message begins with {MAGIC!r}, got {magic!r}")
        if not 0 < header <= HEADER_BYTES or payload > limit:
            raise BadMessage(
                f"a message has 1 to {HEADER_BYTES} bytes of header and up to {limit} of arrays, "
                f"got {header} and {payload}"
            )
        return cls(header, payload, checksum)


def encoded(message: Message, limit: int = PAYLOAD_BYTES) -> list[bytes | memoryview]:
    """The buffers of a message, to be sent in this order; arrays are not copied.

    Raises:
      ValueError: an array is of a kind or size that messages do not have.
    """
    arrays = [np.ascontiguousarray(x).reshape(np.shape(x)) for x in message.arrays]
    for x in arrays:
        if str(x.dtype) not in DTYPES or x.ndim > MOST_AXES:
            raise ValueError(
                f"messages have arrays of up to {MOST_AXES} axes of {', '.join(DTYPES)}; got "
                f"{x.dtype} with {x.ndim}"
            )
    kinds = [[str(x.dtype), list(x.shape)] for x in arrays]
    described = {"what": message.what, "fields": message.fields, "arrays": kinds}
    header = json.dumps(described, allow_nan=False, separators=(",", ":")).encode()
    parts = [x.reshape(-1).view(np.uint8).data for x in arrays]
    size = sum(map(len, parts))
    if len(header) > HEADER_BYTES or size > limit or len(arrays) > MOST_ARRAYS:
        raise ValueError(
            f"a message of {len(header)} bytes of header, {len(arrays)} arrays and {size} bytes in "
            f"them is too large; the limits are {HEADER_BYTES}, {MOST_ARRAYS} and {limit}"
        )
    checksum = zlib.crc32(header)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return [HEAD.pack(MAGIC, len(header), size, checksum) + header, *parts]


def decoded(head: Head, header: bytes, payload: bytearray) -> Message:
    """The message; its arrays are views of `payload`.

    Raises:
      BadMessage: header and payload are damaged, or do not fit each other.
    """
    if zlib.crc32(payload, zlib.crc32(header)) != head.checksum:
        raise BadMessage("a message is damaged: its checksum differs")
    try:
        described = json.loads(header)
        what, fields, kinds = (described[name] for name in ("what", "fields", "arrays"))
        arrays = [_kind(one) for one in kinds]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadMessage("a message's header is not that of one") from error
    if not isinstance(what, str) or not isinstance(fields, dict) or len(arrays) > MOST_ARRAYS:
        raise BadMessage("a message's header is not that of one")
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in arrays)
    if size != len(payload):
        raise BadMessage(f"a message's arrays have {size} bytes, and {len(payload)} came")
    found, at = [], 0
    for dtype, shape in arrays:
        count = math.prod(shape)
        found.append(np.frombuffer(payload, dtype, count, at).reshape(shape))
        at += count * dtype.itemsize
    return Message(what, fields, tuple(found))


def _kind(described: object) -> tuple[np.dtype, tuple[int, ...]]:
    if not isinstance(described, list):
        raise TypeError
    name, sizes = described
    if len(sizes) > MOST_AXES or not all(type(n) is int and 0 <= n < 2**40 for n in sizes):
        raise ValueError
    return DTYPES[name], tuple(sizes)
