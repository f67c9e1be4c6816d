"""Which tiling a kernel takes: the best one that was timed on such a device, else a heuristic's.

`tools/kernels/tune_kernels.py` times the `candidates` of each `configs.py` on a GPU and writes the
best to `tuned/DEVICE.json`, a file for each kind of device:

    {"device": "NVIDIA H200", "jax": "0.10.2", "date": "2026-11-26", "command": "python ...",
     "kernels": {"modal_step": {"batch 64, channels 4096, modes 8":
                                {"rows": 1, "channels": 64, "modes": 8}}}}
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from pallas_kernels.shapes import power_of_two

C = TypeVar("C")
Entries = dict[str, dict[str, dict[str, int]]]  # fields by kernel and key

FOLDER = Path(__file__).parent / "tuned"
# Sizes that change from call to call share an entry up to the next power of two; those of a model
# have each their own.
VARYING = {
    "batch", "keys", "lists", "places", "rows", "run", "runs", "selected", "together", "tokens",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What `choose` was asked for: `sizes` are the heuristic's arguments, `default` its answer."""

    kernel: str
    key: str
    sizes: tuple[int, ...]
    default: Any


_LOOKUPS: ContextVar[list[Lookup] | None] = ContextVar("lookups", default=None)


def choose(kernel: str, heuristic: Callable[..., C], *sizes: int, **also: int) -> C:
    """The tuned configuration of `kernel` for such sizes, else `heuristic(*sizes)`.

    `also` names what registers and time depend on though the heuristic does not: it is part of the
    key, so that no tiling is used where it was never timed.
    """
    default = heuristic(*sizes)
    named = dict(zip(inspect.signature(heuristic).parameters, sizes, strict=False))
    key = key_of(named | also)
    seen = _LOOKUPS.get()
    if seen is not None:
        seen.append(Lookup(kernel=kernel, key=key, sizes=sizes, default=default))
    return tuned(kernel, key, type(default)) or default


@contextlib.contextmanager
def lookups() -> Iterator[list[Lookup]]:
    """Collects what this thread's traces ask `choose` for, so that a search has the same keys."""
    seen: list[Lookup] = []
    token = _LOOKUPS.set(seen)
    try:
        yield seen
    finally:
        _LOOKUPS.reset(token)


def key_of(sizes: Mapping[str, int]) -> str:
    """The sizes as text, the varying ones rounded up to powers of two.

    Example:
      >>> key_of({"batch": 5, "heads": 3})
      'batch 8, heads 3'
    """
    rounded = {name: power_of_two(n) if name in VARYING else n for name, n in sizes.items()}
    return ", ".join(f"{name} {n}" for name, n in rounded.items())


def tuned(kernel: str, key: str, config: type[C]) -> C | None:
    """What is stored for this process' first device; None where nothing is, or it is no GPU."""
    if jax.default_backend() != "gpu":
        return None
    path = path_of(jax.devices()[0].device_kind)
    fields = _read_once(path).get(kernel, {}).get(key)
    if fields is None:
        return None
    try:
        return config(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has no valid configuration of {kernel} for {key!r}: {error}; take the entry "
            "out or run tools/kernels/tune_kernels.py again"
        ) from error


def path_of(device_kind: str) -> Path:
    """The file of a kind of device: "NVIDIA H200" has tuned/nvidia-h200.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
    return FOLDER / f"{slug}.json"


def read(path: Path) -> Entries:
    """What the file holds for each kernel and key; nothing if there is no file."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not JSON: {error}; {_REMEDY}") from error
    kernels = record.get("kernels") if isinstance(record, dict) else None
    if not _is_tree_of_integers(kernels, depth=3):
        raise ValueError(
            f'{path} must hold "kernels": {{kernel: {{key: {{field: integer}}}}}}; {_REMEDY}'
        )
    return kernels  # type: ignore[return-value]


_REMEDY = "delete it or write it anew with tools/kernels/tune_kernels.py"
_read_once = functools.cache(read)


def _is_tree_of_integers(tree: Any, depth: int) -> bool:
    if depth == 0:
        return type(tree) is int and 0 <= tree < 2**31
    if not isinstance(tree, dict):
        return False
    return all(_is_tree_of_integers(branch, depth - 1) for branch in tree.values())


def near(n: int, least: int = 1, most: int | None = None) -> list[int]:
    """`n`, and of its half and its double those within the bounds."""
    others = (x for x in (n // 2, 2 * n) if x >= least and (most is None or x <= most))
    return [n, *others]


def around(first: C, *grids: Mapping[str, Iterable[int]]) -> list[C]:
    """`first`, then what it becomes with every combination of each grid's values, each once."""
    found = [first]
    for grid in grids:
        for values in itertools.product(*grid.values()):
            changes = dict(zip(grid, values, strict=True))
            found.append(dataclasses.replace(first, **changes))  # type: ignore[type-var]
    return list(dict.fromkeys(found))
