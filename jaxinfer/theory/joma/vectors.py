"""Arrays that users pass: numbers, finite, as float64."""

from collections.abc import Sequence

import numpy as np
from jax import Array

from jaxinfer.arguments import shown

Numbers = float | Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Array
"""One number, a vector or a matrix."""


def finite_array(name: str, given: object) -> np.ndarray:
    """The values as NumPy float64.

    Raises:
        ValueError: for what is no array of finite real numbers.
    """
    try:
        array = np.asarray(given)
        if array.dtype.kind not in "iuf":
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of numbers, got {shown(given)}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {shown(given)}")
    return array
