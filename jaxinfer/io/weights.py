"""Filling a parameter tree from a store of named tensors, one tensor at a time.

A `TensorStore` is an open checkpoint (safetensors, GGUF). Every leaf is allocated once, at its
final size, dtype and alignment, and written block by block, so the memory in use never exceeds the
result plus one source tensor. On a CPU the finished buffer becomes the `jax.Array` without a copy.
"""

import contextlib
import itertools
import math
import mmap
import re
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.files import one_line, quoted
from jaxinfer.io.tied_head import sources_as_stored
from jaxinfer.models.family import Family, Path, Source
from jaxinfer.models.params import abstract_params, leaf_path
from jaxinfer.models.part import leaves_of_part
from jaxinfer.runtime.memory import available_bytes, readable
from jaxinfer.typing import Params

ALIGNMENT = 64
"""Bytes; XLA's CPU client borrows a host buffer with this alignment instead of copying it."""

BLOCK_BYTES = 8 * 2**20
LARGEST_PARAMETER_BYTES = 2**41
_LAYER = re.compile(r"\b(?:layers|h|blocks|blk)\.(\d{1,9})\.")

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`, in parameter leaves."""


@runtime_checkable
class TensorStore(Container[str], Protocol):
    """An open checkpoint. `read` may return a view of a mapped file; `release` ends its use."""

    where: str

    def unused(self, used: Collection[str]) -> Iterable[str]:
        """The file's own names of the tensors that none of `used` stands for."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of what `read` returns, from the file's header alone."""
        ...

    def read(self, name: str) -> np.ndarray: ...

    def release(self, name: str) -> None: ...


def build_params(
    cfg: ModelConfig,
    family: Family,
    store: TensorStore,
    dtype: np.dtype,
    progress: Progress | None = None,
    layers: range | None = None,
) -> Params:
    """The parameters of `cfg` from `store`, or of some `layers` with the ends that they touch;
    ValueError names a tensor that is missing or wrong.

    All names and sizes are compared before anything is allocated.
    """
    tree = parameter_shapes(cfg, dtype)
    wanted, made = leaves_of_part(cfg, tree, range(cfg.num_layers) if layers is None else layers)
    every = jax.tree_util.tree_leaves_with_path(tree)
    leaves = [every[number] for number in wanted]
    shapes = {leaf_path(path): leaf.shape for path, leaf in leaves}
    dtypes = {leaf_path(path): np.dtype(leaf.dtype) for path, leaf in leaves}
    sources = sources_as_stored(cfg, family, store)
    names = {path: family.locate(sources[path], store) for path in shapes}
    _check_sizes(store, shapes, names)
    check_room([leaf for _, leaf in leaves], store.where)
    if layers is None:
        _warn_unused(cfg, family, store, set(names.values()))
    arrays: dict[Path, jax.Array] = {}
    # leaves of one fused tensor follow each other, so that the store reads it once
    first_use = {name: index for index, name in enumerate(dict.fromkeys(names.values()))}
    order = sorted(shapes, key=lambda path: first_use[names[path]])
    for path, following in itertools.zip_longest(order, order[1:]):
        arrays[path] = _read_leaf(store, names[path], sources[path], shapes[path], dtypes[path])
        if following is None or names[following] != names[path]:
            store.release(names[path])
        if progress is not None:
            progress(len(arrays), len(shapes))
    return made([arrays[path] for path in shapes])


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose data starts on an `ALIGNMENT` boundary."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def place(array: np.ndarray) -> jax.Array:
    """`array` on the default device; on a CPU an aligned array is borrowed, not copied."""
    return jax.device_put(array, may_alias=True)


def parameter_shapes(cfg: ModelConfig, dtype: np.dtype) -> Params:
    """`abstract_params`, refused where no machine could hold them."""
    tree = abstract_params(cfg, dtype)
    size = sum(int(np.prod(leaf.shape, dtype=object)) for leaf in jax.tree.leaves(tree))
    if size * dtype.itemsize > LARGEST_PARAMETER_BYTES:
        raise ValueError(f"the config asks for {size} parameters; is it the config of this model?")
    return tree


def check_room(leaves: Iterable[jax.ShapeDtypeStruct], where: str) -> None:
    """Refuses parameters that the memory cannot hold: the system would kill the process."""
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    available = available_bytes()
    if available is not None and size > available:
        raise ValueError(
            f"{where}: the parameters take {readable(size)}, there are {readable(available)} of "
            "memory available; load them as bfloat16, or free memory"
        )


def _check_sizes(
    store: TensorStore, shapes: Mapping[Path, tuple[int, ...]], names: Mapping[Path, str]
) -> None:
    """Every tensor has as many values as the leaves that are read from it."""
    wanted: dict[str, list[tuple[int, ...]]] = {}
    for path, name in names.items():
        wanted.setdefault(name, []).append(shapes[path])
    for name, parts in wanted.items():
        found = store.shape(name)
        if math.prod(found) != sum(math.prod(part) for part in parts):
            asked = " + ".join(str(list(part)) for part in parts)
            raise ValueError(
                f"{store.where}: tensor {quoted(name)} has shape {list(found)}, the config asks "
                f"for {asked}; config and checkpoint disagree"
            )


def _read_leaf(
    store: TensorStore, name: str, source: Source, shape: tuple[int, ...], dtype: np.dtype
) -> jax.Array:
    what = f"{store.where}: tensor {quoted(name)}"
    try:
        values = source.transform(store.read(name))
    except (ValueError, IndexError) as error:
        if name in str(error):
            raise
        raise ValueError(f"{what}: {one_line(error)}") from error
    if values.shape != shape:
        raise ValueError(
            f"{what} gives shape {list(values.shape)}, the config asks for {list(shape)}; config "
            "and checkpoint disagree"
        )
    result = aligned_empty(shape, dtype)
    copy_finite(result, values, what)
    return place(result)


def copy_finite(result: np.ndarray, values: np.ndarray, what: str) -> None:
    """Cast `values` into `result` in blocks that run along the source's memory.

    Raises:
      ValueError: a value is not finite, before or after the cast; `what` names the tensor.
    """
    if result.ndim == 0 or result.size == 0:
        raise ValueError(f"{what} is empty")
    axis = int(np.argmax(np.abs(values.strides)))
    rows = max(1, BLOCK_BYTES * values.shape[axis] // max(1, values.size * 4))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, values.shape[axis], rows):
            index = (slice(None),) * axis + (slice(start, start + rows),)
            result[index] = values[index]
            if np.isfinite(result[index]).all():
                continue
            if np.isfinite(values[index]).all():
                raise ValueError(
                    f"{what} holds values outside the range of {result.dtype.name}; "
                    "load it as float32 or bfloat16"
                )
            raise ValueError(f"{what} holds non-finite values (NaN or infinity); it is damaged")


def _warn_unused(cfg: ModelConfig, family: Family, store: TensorStore, used: set[str]) -> None:
    """Says in one line which tensors of the file the config has no place for."""
    ignored = [re.compile(pattern) for pattern in family.ignored]
    # a tied head is often stored a second time; `config_as_stored` has seen that it is the same
    heads = ("lm_head.weight", "embed_out.weight") if cfg.tie_embeddings else ()
    unused = [
        name
        for name in store.unused(used)
        if not name.endswith(heads) and not any(pattern.search(name) for pattern in ignored)
    ]
    if not unused:
        return
    layers = 1 + max((int(n) for name in unused for n in _LAYER.findall(name)), default=-1)
    deeper = f" (the config says {cfg.num_layers} layers, the file has {layers})"
    warnings.warn(
        f"{store.where}: {len(unused)} tensors are not part of the {family.name} model of the "
        f"config and were not read: {', '.join(one_line(n, 80) for n in sorted(unused)[:3])}"
        + (", ..." if len(unused) > 3 else "")
        + (deeper if layers > cfg.num_layers else ""),
        stacklevel=3,
    )


def drop_pages(mapping: mmap.mmap, offset: int, count: int) -> None:
    """Give back the pages of a mapped file, which otherwise count as this process's memory."""
    if hasattr(mapping, "madvise"):
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, start, offset + count - start)


def close_quietly(mapping: mmap.mmap) -> None:
    """Close a memory map unless arrays still point into it."""
    with contextlib.suppress(BufferError):
        mapping.close()
