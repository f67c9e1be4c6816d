"""The residual sum in front of a block and its RMS (arXiv 1910.07467) or layer normalisation.

XLA:GPU takes two launches for a normalisation, and adds up all earlier residuals again in each
where it finds that cheaper than to store the sum. Axis letters: R rows, D model width.
"""

import functools

from jaxtyping import Array, Float

from pallas_kernels.add_norm import reference
from pallas_kernels.add_norm.configs import Config, heuristic
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.shapes import expect
from pallas_kernels.tuned import choose


def add_norm(
    x: Array,
    delta: Array | None,
    scale: Array,
    bias: Array | None = None,
    *,
    kind: str,
    eps: float,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """`(y, norm(y))` with `y = x + delta`, both in the dtype of `x`; without `delta` y is `x`.

    The sum is rounded to that dtype before it is normalised, which is done in float32.

    Args:
      x, delta: float[..., D]; R are all rows.
      scale, bias: float[D], of the normalised rows.
      kind: "rms", "layer", or "rms_outside", which adds eps to the root of the mean square.
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.

    Raises:
      ValueError: if a shape or `kind` does not fit.
    """
    if delta is not None:
        expect("delta", delta, x.shape)
    for name, one in (("scale", scale), ("bias", bias)):
        if one is not None:
            expect(name, one, x.shape[-1:])
    if kind not in ("rms", "rms_outside", "layer"):
        raise ValueError(f"kind must be 'rms', 'rms_outside' or 'layer', got {kind!r}")
    config = config or choose("add_norm", heuristic, x.size // x.shape[-1], x.shape[-1])
    y, normed = dispatch(
        implementation,
        functools.partial(reference.add_norm, kind=kind, eps=eps),
        functools.partial(_add_norm, kind=kind, eps=eps, config=config),
        x, delta, scale, bias,
    )  # fmt: skip
    return y, normed


def _add_norm(x, delta, scale, bias, **options):
    from pallas_kernels.add_norm import triton  # a CPU never pays for Pallas

    rows = (-1, x.shape[-1])
    found = triton.add_norm(
        x.reshape(rows), None if delta is None else delta.reshape(rows), scale, bias, **options
    )
    return tuple(one.reshape(x.shape) for one in found)
