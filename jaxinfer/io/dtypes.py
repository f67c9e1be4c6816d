"""Names of the floating-point types that checkpoints and `load(dtype=...)` use.

Parameters have one of three; integers and 8-bit floats are refused by name, because without their
scales they are not weights.
"""

from typing import TypeAlias

import ml_dtypes
import numpy as np

from jaxinfer.arguments import shown

DType: TypeAlias = str | np.dtype | type | None
"""How a dtype is given: its name, a NumPy or JAX type, or None for that of the back end."""

BY_NAME: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def resolve_dtype(dtype: DType = None) -> np.dtype:
    """The NumPy dtype of a name, a dtype, or None: float32 on CPU, bfloat16 on an accelerator."""
    if dtype is None:
        import jax

        return BY_NAME["float32" if jax.default_backend() == "cpu" else "bfloat16"]
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except Exception:  # NumPy tries to make a structure of whatever it is given
        name = ""
    if name not in BY_NAME:
        raise ValueError(f"unknown dtype {shown(name or dtype)}; use one of {', '.join(BY_NAME)}")
    return BY_NAME[name]
