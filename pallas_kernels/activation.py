"""Activation functions by name: `REFERENCE` for XLA, `KERNEL` for bodies of Triton kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# log(erfc(z) exp(z^2) / t) as a polynomial in t = 1 / (1 + z / 2), z >= 0, lowest power first: a
# minimax fit made for this file; the relative error of erfc is 1e-7 before rounding.
ERFC = (
    -1.2655122201, 1.00002264988, 0.374125038075, 0.0963881319266, -0.183966157436,
    0.27135150564, -1.12109973861, 1.47325524849, -0.813325541575, 0.168761002907,
)  # fmt: skip


def gelu(x):
    """`x erfc(-x / sqrt 2) / 2`; neither erf nor erfc lowers to Triton."""
    z = jnp.abs(x) * 0.5**0.5
    t = 1 / (1 + 0.5 * z)
    log = jnp.full_like(t, ERFC[-1])
    for coefficient in ERFC[-2::-1]:
        log = log * t + coefficient
    tail = t * jnp.exp(log - z * z)  # erfc(z)
    return 0.5 * x * jnp.where(x > 0, 2 - tail, tail)


REFERENCE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}
KERNEL = REFERENCE | {"gelu": gelu}


def check_activation(name: str) -> None:
    """Raises unless `name` is known."""
    if name not in REFERENCE:
        names = ", ".join(map(repr, REFERENCE))
        raise ValueError(f"activation must be one of {names}, got {name!r}")
