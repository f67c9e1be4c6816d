"""Floating arrays in about one byte per parameter: matrices as int8 rows with a float32 scale each
(`NAME#scale`), everything else as it is."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.arrays import ArrayFile, check_finite
from jaxinfer.io.weights import check_room
from jaxinfer.models.params import is_filter, leaf_name
from jaxinfer.nn.int8 import dequantize_rows, quantize_rows
from jaxinfer.typing import Leaf

SCALE = "#scale"


def encoded(arrays: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """What a file holds of the arrays, by name."""
    stored: dict[str, np.ndarray] = {}
    for name, leaf in arrays.items():
        if has_rows(name, leaf):
            stored[name], stored[name + SCALE] = quantize_rows(np.asarray(leaf, np.float32))
        else:
            stored[name] = np.asarray(leaf)
    return stored


def decoded(
    file: ArrayFile, shapes: Mapping[str, jax.ShapeDtypeStruct], others: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The arrays of these names and shapes, matrices in float32.

    Every one is held against the file's header before any is read; `others` are the names of what
    else the file may hold.

    Raises:
      ValueError: an array is missing, unknown, of another shape or not finite.
    """
    matrices = {name + SCALE: leaf for name, leaf in shapes.items() if has_rows(name, leaf)}
    for name, leaf in shapes.items():
        file.check(name, leaf.shape, np.int8 if has_rows(name, leaf) else leaf.dtype)
    for name, leaf in matrices.items():
        file.check(name, scale_shape(leaf), np.float32)
    file.check_names({*shapes, *matrices, *others})
    check_room(shapes.values(), str(file.path))
    return {name: _read(file, name, leaf) for name, leaf in shapes.items()}


def as_stored(tree: Any) -> Any:
    """The tree as a file gives it back; doing it again changes nothing."""

    def one(path: tuple[Any, ...], leaf: Leaf) -> np.ndarray:
        if not has_rows(leaf_name(path), leaf):
            return np.asarray(leaf)
        return dequantize_rows(*quantize_rows(np.asarray(leaf, np.float32)))

    return jax.tree_util.tree_map_with_path(one, tree)


def has_rows(name: str, leaf: Leaf) -> bool:
    """Whether an array is stored as rows: matrices, but no filters."""
    is_matrix = len(leaf.shape) > 1 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return is_matrix and not is_filter(name)


def scale_shape(matrix: Leaf) -> tuple[int, ...]:
    """The shape of a matrix's scales."""
    return (matrix.shape[0], 1, *matrix.shape[2:])


def _read(file: ArrayFile, name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if not has_rows(name, leaf):
        value = file.read(name, leaf.shape, leaf.dtype)
    else:
        scale = file.read(name + SCALE, scale_shape(leaf), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            value = dequantize_rows(file.read(name, leaf.shape, np.int8), scale)
    check_finite(value, f"array {name!r}")
    return value
