"""Trees of floating arrays in about one byte per parameter: matrices as int8 rows with one float32
scale each (`NAME#scale`), vectors as float32, integers as int32."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.arrays import ArrayFile, check_finite
from jaxinfer.io.weights import check_room
from jaxinfer.nn.int8 import dequantize_rows, quantize_rows
from jaxinfer.typing import Leaf

SCALE = "#scale"


def encoded(arrays: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """The arrays of a file by name."""
    stored: dict[str, np.ndarray] = {}
    for name, leaf in arrays.items():
        if _is_matrix(leaf):
            stored[name], stored[name + SCALE] = quantize_rows(np.asarray(leaf, np.float32))
        else:
            stored[name] = np.asarray(leaf, _vector_dtype(leaf))
    return stored


def decoded(
    file: ArrayFile, shapes: Mapping[str, jax.ShapeDtypeStruct], others: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The arrays of these names and shapes in float32, integers in int32.

    Every one is held against the file's header before any is read; `others` are the names of what
    else the file may hold.

    Raises:
      ValueError: an array is missing, unknown, of another shape or not finite.
    """
    for name, leaf in shapes.items():
        if _is_matrix(leaf):
            file.check(name, leaf.shape, np.int8)
            file.check(name + SCALE, (leaf.shape[0], 1, *leaf.shape[2:]), np.float32)
        else:
            file.check(name, leaf.shape, _vector_dtype(leaf))
    matrices = {name + SCALE for name, leaf in shapes.items() if _is_matrix(leaf)}
    file.check_names({*shapes, *matrices, *others})
    check_room(shapes.values(), str(file.path))
    return {name: _read(file, name, leaf) for name, leaf in shapes.items()}


def as_stored(tree: Any) -> Any:
    """The tree as a file gives it back; doing it again changes nothing."""

    def one(leaf: Leaf) -> np.ndarray:
        if not _is_matrix(leaf):
            return np.asarray(leaf, _vector_dtype(leaf))
        return dequantize_rows(*quantize_rows(np.asarray(leaf, np.float32)))

    return jax.tree.map(one, tree)


def _read(file: ArrayFile, name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if not _is_matrix(leaf):
        value = file.read(name, leaf.shape, _vector_dtype(leaf))
    else:
        scale = file.read(name + SCALE, (leaf.shape[0], 1, *leaf.shape[2:]), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            value = dequantize_rows(file.read(name, leaf.shape, np.int8), scale)
    check_finite(value, f"array {name!r}")
    return value


def _is_matrix(leaf: Leaf) -> bool:
    return len(leaf.shape) > 1


def _vector_dtype(leaf: Leaf) -> np.dtype:
    return np.dtype(np.int32 if jnp.issubdtype(leaf.dtype, jnp.integer) else np.float32)
