"""Comparisons of arrays and of trees that say what differs."""

import jax
import numpy as np

from jaxinfer.typing import Leaf


def close(dtype: str = "float32") -> dict[str, float]:
    """Tolerance for logits of size about 10: sums in another order, through two layers."""
    return {"rtol": 0.0, "atol": 2e-4 if dtype == "float32" else 0.3}


def assert_close(found: Leaf, expected: Leaf, what: str, dtype: str = "float32") -> None:
    """Equal within `close`; `what` says which promise is broken if not."""
    tolerance = close(dtype)
    np.testing.assert_allclose(
        found, expected, rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=what
    )


def assert_same(found: Leaf, expected: Leaf, what: str = "") -> None:
    """Trees equal in every bit (NaN equals NaN)."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, err_msg=what), found, expected)


def row_of(tree: Leaf, row: int | np.integer) -> Leaf:
    """Row `row` of every leaf, as numpy."""
    return jax.tree.map(lambda x: np.asarray(x)[row], tree)
