"""The residual sum in front of a block and its RMS (arXiv 1910.07467) or layer normalisation.

XLA:GPU takes two launches for a normalisation, and adds up all earlier residuals again in each
where it finds that cheaper than to store the sum. Axis letters: R rows, D model width.
"""

import functools

from jaxtyping import Array, Float

from pallas_kernels.add_norm import reference, triton
from pallas_kernels.add_norm.configs import Config, heuristic
from pallas_kernels.common import expect
from pallas_kernels.dispatch import Implementation, dispatch
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
) -> tuple[Float[Array, "R D"], Float[Array, "R D"]]:
    """`(y, norm(y))` with `y = x + delta`, both in the dtype of `x`; without `delta` y is `x`.

    The sum is rounded to that dtype before it is normalised, which is done in float32.

    Args:
      x, delta: float[R, D].
      scale, bias: float[D], of the normalised rows.
      kind: "rms" or "layer".
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.

    Raises:
      ValueError: if a shape or `kind` does not fit.
    """
    expect("x", x, (None, None))
    if delta is not None:
        expect("delta", delta, x.shape)
    for name, one in (("scale", scale), ("bias", bias)):
        if one is not None:
            expect(name, one, x.shape[1:])
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind must be 'rms' or 'layer', got {kind!r}")
    config = config or choose("add_norm", heuristic, *x.shape)
    y, normed = dispatch(
        implementation,
        functools.partial(reference.add_norm, kind=kind, eps=eps),
        functools.partial(triton.add_norm, kind=kind, eps=eps, config=config),
        x, delta, scale, bias,
    )  # fmt: skip
    return y, normed
