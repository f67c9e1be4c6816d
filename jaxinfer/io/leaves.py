"""The arrays of a model's folder: what each is called, how it is stored, and what becomes of it.

All floating arrays have the model's dtype, but for those that are listed with a dtype of their own:
what selects, scales of 8-bit codes, and whatever was given with another. The model is cast to the
dtype that it is loaded in; those others are not. Codes are int8 and sets of units bool, always.
With `int8_rows` each matrix is int8 with a float32 scale per row, about one byte per number.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.files import quoted
from jaxinfer.io.dtypes import BY_NAME
from jaxinfer.io.int8 import has_rows
from jaxinfer.models.params import named_leaves, stays
from jaxinfer.nn.listed import InputMajor
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.sparsity.stored import SCALES
from jaxinfer.typing import Leaf, Params


@dataclass(frozen=True)
class StoredLeaf:
    """An array [O, ...] in a folder; `dtype` is what it is read as."""

    shape: tuple[int, ...]
    stored: np.dtype
    dtype: np.dtype
    int8_rows: bool = False


def dtypes_of(params: Params) -> tuple[str, dict[str, str]]:
    """The model's dtype, that of its embedding; and the names of those of the arrays that keep one
    of their own."""
    main = str(params["embed"]["tokens"].dtype)
    floats = {
        name: str(leaf.dtype) for name, leaf in named_leaves(params).items() if _is_float(leaf)
    }
    own = {name: dtype for name, dtype in floats.items() if dtype != main or _stays(name)}
    unknown = next((x for x in (main, *own.values()) if x not in BY_NAME), None)
    if unknown is not None:
        raise ValueError(f"parameters of {unknown} cannot be saved; cast them to float32")
    return main, own


def check_tree(params: Params, wanted: Params) -> None:
    """Refuses parameters that a reader would not find where the config has them."""
    stored = [x for x in jax.tree.leaves(params, is_leaf=_is_stored) if _is_stored(x)]
    if stored:
        raise ValueError(
            "weights in fewer bits cannot be saved; save the model that they were made from, with "
            "int8_rows=True (--int8-rows) in about a byte per parameter"
        )
    ours, theirs = named_leaves(params), named_leaves(wanted)
    wrong = sorted(set(ours) ^ set(theirs))
    if wrong:
        what = "is missing" if wrong[0] in theirs else "is no part of the model of the config"
        raise ValueError(f"cannot save the model: {wrong[0]} {what}")
    for name, leaf in theirs.items():
        if ours[name].shape != leaf.shape:
            raise ValueError(
                f"cannot save the model: {name} has shape {list(ours[name].shape)}, the config "
                f"asks for {list(leaf.shape)}"
            )
    if jax.tree.structure(params) != jax.tree.structure(wanted):  # as to static fields
        raise ValueError("cannot save the model: a sparse part is made for another dtype")


def stored_leaves(
    shapes: Params, stored: np.dtype, dtype: np.dtype, own: object, int8_rows: object
) -> dict[str, StoredLeaf]:
    """How a folder holds the arrays of a tree of `shapes`.

    Args:
      shapes: the tree; what is not floating has its dtype already.
      stored: the model's dtype.
      dtype: what the model is cast to.
      own: the arrays that keep a dtype of their own, as a file says it.
      int8_rows: whether matrices are stored as int8 rows, as a file says it.

    Raises:
      ValueError: what the file says makes no sense.
    """
    leaves = named_leaves(shapes)
    if not isinstance(own, dict) or not isinstance(int8_rows, bool):
        raise ValueError("'dtypes' must be an object and 'int8_rows' true or false")
    for name, kind in own.items():
        known = name in leaves and _is_float(leaves[name])
        if not known or not isinstance(kind, str) or kind not in BY_NAME:
            raise ValueError(
                f"'dtypes' gives {quoted(name)} the dtype {quoted(kind, 40)}; expected a floating "
                f"array of the model and one of {', '.join(BY_NAME)}"
            )
    found = {}
    for name, leaf in leaves.items():
        if not _is_float(leaf):
            found[name] = StoredLeaf(leaf.shape, np.dtype(leaf.dtype), np.dtype(leaf.dtype))
            continue
        kept = BY_NAME[own[name]] if name in own else None
        rows = int8_rows and has_rows(name, leaf)
        found[name] = StoredLeaf(leaf.shape, kept or stored, kept or dtype, rows)
    return found


def _is_float(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_stored(leaf: Leaf) -> bool:
    return isinstance(leaf, StoredWeight) and not isinstance(leaf, InputMajor)


def _stays(name: str) -> bool:
    """Whether an array is no weight of the model, so that no cast of the model concerns it."""
    return stays(name) or name.split(".")[-1] in SCALES
