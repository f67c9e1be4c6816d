"""The Hyena operator between its projections (arXiv 2302.10866, section 3), and its filters.

Of order n, with the projections `x_0, ..., x_(n-1), v` behind a short filter:

    v <- conv_o(x_i v)  for i = n-1, ..., 1 (o = 0, ..., n-2),   y = x_0 v

With heads of N channels (MultiHyena, arXiv 2310.18780, section 4; order 2 only) `x_0`, `x_1` and v
are queries, keys and values: one filter convolves the outer product of a head's keys and values,
whose key index is then summed with the query. N = 1 is Hyena.

A layer's filters are parameters {"filter": ..., "skip": [F]} or modes, {"modal": ...}; none of them
is a weight, and no cast may touch them. Filter o of channel c is number `c (n - 1) + o`.

Axis letters: P projections' width (n + 1) D, S taps, A tokens that are seen, F filters, L lags.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.hyena_config import HyenaConfig
from jaxinfer.nn.modal import ModalFilter, impulse_response
from jaxinfer.ops.long_convolution import Seen
from jaxinfer.typing import Params

Convolve = Callable[[int, Array, Array], Array]
"""`convolve(o, query, inputs)`: stage o of `operator` over all that its tokens see."""


def operator(
    cfg: HyenaConfig, s: Float[Array, "B T P"], convolve: Convolve
) -> tuple[Float[Array, "B T D"], Float[Array, "B T I"]]:
    """The gated output, and what the convolutions take of these tokens: the gated channels [B, T,
    F], or keys and values side by side [B, T, 2D] of heads."""
    out, *gates, v = jnp.split(s, cfg.order + 1, axis=-1)
    if cfg.head_size > 1:
        inputs = jnp.concatenate([gates[0], v], axis=-1)
        return convolve(0, out, inputs), inputs
    taken = []
    for stage, gate in enumerate(reversed(gates)):
        taken.append(gate * v)
        v = convolve(stage, out, taken[-1])
    return out * v, jnp.stack(taken, axis=-1).reshape(*v.shape[:-1], -1)


def short_filter(
    params: Params, p: Float[Array, "B A P"], seen: Seen | None, size: int
) -> Float[Array, "B T P"]:
    """`bias + sum_j taps[:, S - 1 - j] p_(t-j)` for the last `size` of A tokens, of which the first
    S - 1 are those before the text; along `seen`, or in a chain."""
    taps = params["taps"].astype(jnp.promote_types(params["taps"].dtype, jnp.float32))
    count, total = taps.shape[1], params.get("bias", jnp.zeros(len(taps))).astype(taps.dtype)
    for j in range(count):
        if seen is None:
            first = p.shape[1] - size - j
            there = p[:, first : first + size].astype(taps.dtype)
        else:  # the ancestor at that distance, as a product with ones and zeros
            at = (seen.visible & (seen.lag == j)).astype(taps.dtype)
            rows = "bta,bap->btp" if len(at) > 1 else "ota,bap->btp"
            there = jnp.einsum(rows, at, p.astype(taps.dtype), precision="highest")
        total = total + taps[:, count - 1 - j] * there
    return total


def response(
    cfg: HyenaConfig, params: Params, length: int, positions: int, *, skip: bool = True
) -> Float[Array, "F L"]:
    """The filters of a layer at lags 0 to `length` - 1, in float32; `positions` are those of the
    model. Shorter filters are filled up with zeros. Without `skip` lag 0 may lack the skip
    connection, and an array that is there need not be copied."""
    modal = modal_part(params)
    if modal is not None:
        return impulse_response(modal, length)
    own = params["filter"]
    if "h" in own:
        h = own["h"][:, :length]
    else:
        from jaxinfer.nn.filters import ImplicitFilter  # flax is slow to import

        module = ImplicitFilter(len(params["skip"]), positions, cfg.filter)
        h = module.apply({"params": own}, min(length, positions))
    assert isinstance(h, jax.Array)
    h = jnp.pad(h, [(0, 0), (0, length - h.shape[1])])
    return h.at[:, 0].add(params["skip"]) if skip else h


def sizes(params: Params) -> tuple[int, int]:
    """Modes by which a layer computes, and taps in front of them; of shapes, or arrays. Neither: it
    computes by its filter."""
    own = params.get("modal", params["filter"])
    found = (own.get("nu", own.get("pole_re")), own.get("taps"))
    modes, taps = (0 if leaf is None else leaf.shape[1] for leaf in found)
    return modes, taps


def modal_part(params: Params) -> ModalFilter | None:
    """The modes by which a layer computes, if it has any."""
    if "modal" in params:
        none = jnp.zeros((len(params["modal"]["h0"]), 0), jnp.float32)  # behind taps alone
        return ModalFilter(**(dict.fromkeys(("nu", "theta", "a", "b"), none) | params["modal"]))
    own = params["filter"]
    if "nu" in own:
        zeros = jnp.zeros_like(own["nu"])  # real poles turn by no angle and have real residues
        return ModalFilter(**({"theta": zeros, "b": zeros} | own))
    if "pole_re" not in own:
        return None
    re, im, a, b = (own[name] for name in ("pole_re", "pole_im", "residue_re", "residue_im"))
    return ModalFilter(
        nu=jnp.log(-0.5 * jnp.log1p(_beyond_circle(re, im))),
        theta=jnp.arctan2(im, re),
        a=a * re - b * im,
        b=a * im + b * re,
        h0=own["skip"] + a.sum(axis=1),
    )


def _beyond_circle(re: Array, im: Array) -> Array:
    """|p|^2 - 1, in which near the circle all digits of |p|^2 cancel: squares in two parts."""
    total = jnp.full_like(re, -1)
    rest = jnp.zeros_like(re)
    for x in (re, im):
        if x.dtype == jnp.float32:
            bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
            upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
        else:
            upper = x
        total = total + upper * upper  # exact products of 12 bits
        rest = rest + (x - upper) * (x + upper)
    return jnp.minimum(total + rest, -(2.0**-24))
