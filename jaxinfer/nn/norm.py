"""RMS and layer normalisation, computed in float32 and cast back to the input's dtype."""

from jaxtyping import Array, Float

from jaxinfer.config import Norm
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels import add_norm as kernels
from pallas_kernels.add_norm.reference import normalised


def norm(
    params: Params, x: Float[Array, "... D"], *, kind: Norm, eps: float
) -> Float[Array, "... D"]:
    """`x` normalised over its last axis, scaled and (where the parameters have a bias) shifted."""
    return normalised(x, params["scale"], params.get("bias"), kind=kind, eps=eps)


def undivided(params: Params, normed: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """What a norm puts out, times the `divisor` that was divided into it, if one was
    (`jaxinfer.models.calibrate`): what its readers see that were told nothing of it."""
    divisor = params.get("divisor")
    return normed if divisor is None else (normed * divisor).astype(normed.dtype)


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

    return kernels.add_norm(
        x, delta, params["scale"], params.get("bias"), kind=kind, eps=eps,
        implementation="reference" if backend is None else backend.implementation,
    )  # fmt: skip
