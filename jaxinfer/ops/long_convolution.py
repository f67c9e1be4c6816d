"""Causal convolutions with filters as long as the text, in float32 or wider.

    causal:    y_t = sum_{s <= t} h_(t-s) u_s                                   a filter a channel
    outer:     y_t = sum_{s <= t} h_(t-s) <q_t, k_s> v_s                        a filter a head

The second is MultiHyena (arXiv 2310.18780, section 4): the outer products k_s v_s^T of a head are
convolved with its one filter and the KEY index is summed with the query; which is linear attention
with a Toeplitz mask. Filters are [F, L] with lag 0 first; a filter shorter than the text ends
there. Sums are of float32 products: bfloat16 has no FFT, and a filter no 8 bits to lose.

Few tokens are multiplied by Toeplitz matrices, many by FFT: the matrix of T = 64 lags takes
64 F numbers a token.

Axis letters: C channels, F filters, N channels of a head (C = F N), A tokens that are seen, the
last T of which ask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.typing import Leaf

FEW = 64
"""Tokens that a single Toeplitz matrix takes."""


class Seen(NamedTuple):
    """Which tokens each of T tokens sees, and how many steps ago: a chain, or a tree by its
    ancestors."""

    lag: Leaf  # i32[B|1, T, A]; anything where not visible
    visible: Leaf  # bool[B|1, T, A]

    @classmethod
    def chain(cls, size: int, all_tokens: int) -> "Seen":
        """The last `size` of `all_tokens` consecutive tokens."""
        order = jnp.arange(all_tokens)
        lag = (order[all_tokens - size :, None] - order)[None]
        return cls(lag, lag >= 0)

    def weights(self, h: Float[Array, "F L"]) -> Float[Array, "F _ T A"]:
        """The filters' values at the lags, 0 where nothing is seen or the filter has ended."""
        known = self.visible & (self.lag < h.shape[1])
        return jnp.where(known, h[:, jnp.clip(self.lag, 0, h.shape[1] - 1)], 0)


def causal_convolution(
    u: Float[Array, "B A C"], h: Float[Array, "C L"], size: int | None = None
) -> Float[Array, "B T C"]:
    """The last `size` outputs (default: all)."""
    size = u.shape[1] if size is None else size
    if u.shape[1] <= FEW:
        return seen_convolution(u, h, Seen.chain(size, u.shape[1]))
    return fft_convolution(u, h)[:, u.shape[1] - size :]


def outer_convolution(
    q: Float[Array, "B T C"],
    k: Float[Array, "B A C"],
    v: Float[Array, "B A C"],
    h: Float[Array, "F L"],
) -> Float[Array, "B T C"]:
    """The outputs of the last T of A tokens."""
    if k.shape[1] <= FEW:
        return seen_outer(q, k, v, h, Seen.chain(q.shape[1], k.shape[1]))
    return fft_outer(q, k, v, h)


def fft_convolution(u: Float[Array, "B T C"], h: Float[Array, "C L"]) -> Float[Array, "B T C"]:
    """By a circular convolution of at least 2 T - 1 points."""
    size = u.shape[1]
    points = _points(size)
    spectrum = jnp.fft.rfft(_wide(h)[:, :size], points)
    found = jnp.fft.irfft(jnp.fft.rfft(_wide(u).swapaxes(1, 2), points) * spectrum, points)
    return found[..., :size].swapaxes(1, 2)


def toeplitz_convolution(
    u: Float[Array, "B T C"], h: Float[Array, "C L"], chunk: int = FEW
) -> Float[Array, "B T C"]:
    """By products of chunks with Toeplitz matrices: no FFT, T C / 2 products a token."""
    batch, size, channels = u.shape
    count = -(-size // chunk)
    parts = jnp.pad(_wide(u), [(0, 0), (0, count * chunk - size), (0, 0)])
    parts = parts.reshape(batch, count, chunk, channels)
    order = jnp.arange(chunk)
    total = jnp.zeros_like(parts)
    for apart in range(count):  # chunks between input and output
        lag = apart * chunk + order[:, None] - order
        matrix = Seen(lag[None], (lag >= 0)[None]).weights(_wide(h))[:, 0]
        new = jnp.einsum("cij,bnjc->bnic", matrix, parts[:, : count - apart], precision="highest")
        total = total.at[:, apart:].add(new)
    return total.reshape(batch, -1, channels)[:, :size]


def fft_outer(
    q: Float[Array, "B T C"],
    k: Float[Array, "B A C"],
    v: Float[Array, "B A C"],
    h: Float[Array, "F L"],
) -> Float[Array, "B T C"]:
    """`outer_convolution` one row of the outer products at a time: never T N C numbers at once."""
    batch, size, channels = k.shape
    filters, ahead = len(h), size - q.shape[1]
    points = _points(size)
    spectrum = jnp.fft.rfft(_wide(h)[:, :size], points)[:, None]

    def heads(x: Array) -> Float[Array, "N B F T"]:
        return _wide(x).reshape(batch, -1, filters, channels // filters).transpose(3, 0, 2, 1)

    values = heads(v).transpose(1, 2, 0, 3)

    def row(total: Array, queries_and_keys: tuple[Array, Array]) -> tuple[Array, None]:
        query, key = queries_and_keys
        found = jnp.fft.rfft(values * key[:, :, None], points) * spectrum
        found = jnp.fft.irfft(found, points)[..., ahead:size]
        return total + found * query[:, :, None], None

    total, _ = jax.lax.scan(row, jnp.zeros_like(values[..., ahead:]), (heads(q), heads(k)))
    return total.transpose(0, 3, 1, 2).reshape(batch, -1, channels)


def seen_convolution(
    u: Float[Array, "B A C"], h: Float[Array, "C L"], seen: Seen
) -> Float[Array, "B T C"]:
    """`causal_convolution` along what each token sees (laughing_hyena.md 4.5)."""
    weights = seen.weights(_wide(h))
    if weights.shape[1] == 1:
        return jnp.einsum("cta,bac->btc", weights[:, 0], _wide(u), precision="highest")
    return jnp.einsum("cbta,bac->btc", weights, _wide(u), precision="highest")


def seen_outer(
    q: Float[Array, "B T C"],
    k: Float[Array, "B A C"],
    v: Float[Array, "B A C"],
    h: Float[Array, "F L"],
    seen: Seen,
) -> Float[Array, "B T C"]:
    """`outer_convolution` along what each token sees."""
    batch, size, channels = q.shape
    q, k, v = (_wide(x).reshape(batch, -1, len(h), channels // len(h)) for x in (q, k, v))
    scores = jnp.einsum("btfn,bafn->fbta", q, k, precision="highest") * seen.weights(_wide(h))
    found = jnp.einsum("fbta,bafn->btfn", scores, v, precision="highest")
    return found.reshape(batch, size, channels)


def _points(size: int) -> int:
    return 1 << (2 * size - 2).bit_length()


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
