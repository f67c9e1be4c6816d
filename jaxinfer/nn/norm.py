"""RMS and layer normalisation, computed in float32 and cast back to the input's dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.config import Norm
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels.dispatch import dispatch, implementation_of


def norm(
    params: Params, x: Float[Array, "... D"], *, kind: Norm, eps: float
) -> Float[Array, "... D"]:
    """`x` normalised over its last axis, scaled and (where the parameters have a bias) shifted."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * params["scale"].astype(jnp.float32)
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def add_norm(
    params: Params,
    x: Float[Array, "B T D"],
    delta: Float[Array, "B T D"] | None,
    *,
    kind: Norm,
    eps: float,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """`(y, norm(y))` with `y = x + delta` (None: x itself), by one kernel on a CUDA device.

    Without a `backend` XLA computes it: the kernel has no gradient.
    """

    def reference(x, delta, params):
        y = x if delta is None else x + delta
        return y, norm(params, y, kind=kind, eps=eps)

    def kernel(x, delta, params, *, interpret):
        from pallas_kernels.add_norm import add_norm

        rows = (-1, x.shape[-1])
        found = add_norm(
            x.reshape(rows), None if delta is None else delta.reshape(rows),
            params["scale"], params.get("bias"), kind=kind, eps=eps,
            implementation=implementation_of(interpret),
        )  # fmt: skip
        return tuple(one.reshape(x.shape) for one in found)

    implementation = "reference" if backend is None else backend.implementation
    return dispatch(implementation, reference, kernel, x, delta, params)
