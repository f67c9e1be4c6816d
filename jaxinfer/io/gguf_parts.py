"""GGUF models that llama.cpp split into several files, read as one.

The parts lie beside each other as NAME-00001-of-00003.gguf and so on. The first holds the metadata,
each holds some of the tensors, and all say which part they are: `split.no`, from 0, of
`split.count`. Any part may be given; none may be missing.
"""

import re
from pathlib import Path

from jaxinfer.files import quoted
from jaxinfer.io.gguf_header import MAX_TENSORS, GGUFHeader, read_header

MAX_PARTS = 1000
NAME = re.compile(r"(?P<name>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_model(path: Path) -> GGUFHeader:
    """The header of the model that the file at `path` is, or is a part of.

    Raises:
      ValueError: a file is not sound, a part is missing or is not the part that its name says.
    """
    header = read_header(path)
    count = _number(header, path, "split.count")
    if count <= 1:
        return header
    part = _number(header, path, "split.no")
    what = f"{path} is part {part + 1} of {count} of a split GGUF"
    if count > MAX_PARTS or part >= count:
        raise ValueError(f"{what}; expected one of at most {MAX_PARTS} parts")
    paths = _paths(path, part, count, what)
    headers = [header if other == path else read_header(other) for other in paths]
    for number, (other, found) in enumerate(zip(paths, headers, strict=True)):
        numbers = _number(found, other, "split.no"), _number(found, other, "split.count")
        if numbers != (number, count):
            raise ValueError(
                f"{other} says it is part {numbers[0] + 1} of {numbers[1]}, expected part "
                f"{number + 1} of {count}; download the parts of one model again"
            )
    return _joined(headers, what)


def part_paths(path: Path) -> list[Path]:
    """The files of the model that the GGUF file at `path` is, or is a part of (`read_model`)."""
    match = NAME.fullmatch(path.name)
    count = _number(read_header(path), path, "split.count") if match else 1
    if match is None or count <= 1:
        return [path]
    return _paths(path, int(match["part"]) - 1, count, str(path))


def _paths(path: Path, part: int, count: int, what: str) -> list[Path]:
    """The files of all parts, all there."""
    match = NAME.fullmatch(path.name)
    numbers = (int(match["part"]), int(match["count"])) if match else None
    if match is None or numbers != (part + 1, count):
        raise ValueError(
            f"{what}; name the parts NAME-{1:05}-of-{count:05}.gguf to "
            f"NAME-{count:05}-of-{count:05}.gguf in one folder, or join them with "
            "llama-gguf-split --merge"
        )
    name = match["name"]
    paths = [path.with_name(f"{name}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]
    missing = [n for n, other in enumerate(paths, 1) if not other.is_file()]
    if missing:
        raise ValueError(
            f"{what}; part {missing[0]} ({quoted(paths[missing[0] - 1].name)}) is missing beside "
            f"it{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}; download all parts"
        )
    return paths


def _joined(headers: list[GGUFHeader], what: str) -> GGUFHeader:
    tensors = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise ValueError(f"{what}; tensor {quoted(name)} is in two parts")
            tensors[name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"{what}; it has more than {MAX_TENSORS} tensors")
    metadata = headers[0].metadata
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ValueError(f"{what} with {quoted(total)} tensors, the parts hold {len(tensors)}")
    return GGUFHeader(metadata, tensors)


def _number(header: GGUFHeader, path: Path, key: str) -> int:
    value = header.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise ValueError(f"{path}: metadata {key!r} is {quoted(value)}, expected a number")
    return value
