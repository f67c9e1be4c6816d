"""Pins array layouts inside compiled loops.

XLA:GPU chooses the layout of a loop's own buffers by the products inside. For a batch of one it
turns caches around (measured for an H200: every cache leaf transposed into and out of each call of
the decode loop, and twice the memory). A layout constraint on what the step hands on keeps them as
they are stored; the CPU compiler ignores it.
"""

from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def row_major(tree: Any) -> Any:
    """The same arrays, to be stored with their last axis fastest; only under `jax.jit`."""

    def pin(x: Any) -> Any:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if x.ndim > 1 else x

    return jax.tree.map(pin, tree)
