"""LESS in parallel form: what an eviction policy keeps, and low-rank attention of all rows.

arXiv 2402.09398, section 3. Serving goes token by token (`jaxinfer.cache`); training needs every
row of a text under the frozen model. Eviction is final, so one number per token says it all:
`leave_row`, the first row that no longer sees it (T: never). A policy that keeps C tokens beside a
row's own evicts exactly one per row from then on: row i has lost `max(i - C, 0)` tokens. Hence, in
the order of leaving, the low-rank part is causal linear attention, and rows at a fixed distance
need no products of rows with tokens (`strided_low_rank`).

Queries and keys come rotated, everything is float32. Extra letters: C tokens kept, M rows at a
fixed distance, I tokens evicted between two of them.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.ops.attention import NEGATIVE, AttentionSpec
from jaxinfer.typing import Leaf

NONE = 1e-37  # a low-rank total below this counts as nothing evicted; exp(-log(NONE)) is finite


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """Keeps the first `sinks`, the last `recent` and, per head, the `heavy` most attended tokens.

    sinks=0 is H2O (arXiv 2306.14048), heavy=0 the Lambda mask.
    """

    recent: int
    heavy: int = 0
    sinks: int = 0

    def __post_init__(self):
        if self.recent < 1 or self.heavy < 0 or self.sinks < 0:
            raise ValueError(
                f"an eviction needs recent >= 1 and no negative budget, got {self}; "
                "the own token is not counted"
            )

    @property
    def capacity(self) -> int:
        """Tokens that a row sees beside its own."""
        return self.sinks + self.heavy + self.recent

    def widened(self, tokens: int) -> "Eviction":
        """The policy with `tokens` more, half of them heavy hitters where it has any."""
        heavy = tokens // 2 if self.heavy else 0
        return replace(self, heavy=self.heavy + heavy, recent=self.recent + tokens - heavy)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """Attention of every row over what it still sees."""

    out: Leaf  # f32[B, N, T, H]
    lse: Leaf  # f32[B, N, T], log-sum-exp of the logits
    leave_row: Leaf  # i32[B, K, T]


def kept_attention(
    eviction: Eviction,
    spec: AttentionSpec,
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    dense_lse: Float[Array, "B N T"] | None = None,
) -> Kept:
    """Runs the policy over a text, in C + 1 slots per head.

    A token's score is the probability that it has received, summed over the group's query heads:
    over the tokens still there, as generation sees it, or, given the log-sum-exp of dense
    attention, over the whole past, as a dense model sees it. On a tie the newest candidate leaves,
    as in `jaxinfer.cache.heavy`.
    """
    if spec.slopes is not None or spec.window is not None:
        raise ValueError(
            "LESS serves neither ALiBi nor sliding windows: its state has no distances"
        )
    batch, heads, tokens, width = q.shape
    kv_heads, capacity = k.shape[1], eviction.capacity
    groups = (batch, kv_heads, heads // kv_heads)
    slot = jnp.arange(capacity + 1, dtype=jnp.int32)
    at = jax.vmap(jax.vmap(lambda x, row, i: x.at[i].set(row)))

    def step(state, row):
        keys, values, pos, score, free = state
        index, q, k, v, lse = row
        keys, values = at(keys, k, free), at(values, v, free)
        own = slot == free[..., None]
        pos, score = jnp.where(own, index, pos), jnp.where(own, 0.0, score)
        logits = jnp.einsum("bkgh,bksh->bkgs", q, keys) * spec.scale
        if spec.softcap is not None:
            logits = spec.softcap * jnp.tanh(logits / spec.softcap)
        logits = jnp.where((pos >= 0)[:, :, None], logits, NEGATIVE)
        top = logits.max(axis=-1)
        weights = jnp.exp(logits - top[..., None])
        total = weights.sum(axis=-1)
        weights = weights / total[..., None]
        out, own_lse = jnp.einsum("bkgs,bksh->bkgh", weights, values), top + jnp.log(total)
        seen = weights if lse is None else jnp.exp(logits - lse[..., None])
        score = score + seen.sum(axis=2)
        candidate = (pos >= eviction.sinks) & (pos <= index - eviction.recent)
        standing = jnp.where(candidate, score, jnp.inf)
        least = candidate & (standing == standing.min(axis=-1, keepdims=True))
        leaver = jnp.argmax(jnp.where(least, pos, -1), axis=-1).astype(jnp.int32)
        is_full = index >= capacity
        gone = jnp.take_along_axis(pos, leaver[..., None], axis=-1)[..., 0]
        pos = jnp.where(is_full & (slot == leaver[..., None]), -1, pos)
        free = jnp.where(is_full, leaver, index + 1)
        return (keys, values, pos, score, free), (out, own_lse, jnp.where(is_full, gone, tokens))

    slots = (batch, kv_heads, capacity + 1)
    start = (
        jnp.zeros((*slots, width)),
        jnp.zeros((*slots, width)),
        jnp.full(slots, -1, jnp.int32),
        jnp.zeros(slots),
        jnp.zeros(slots[:2], jnp.int32),
    )
    rows = (
        jnp.arange(tokens, dtype=jnp.int32),
        jnp.moveaxis(q.reshape(*groups, tokens, width), 3, 0),
        jnp.moveaxis(k, 2, 0),
        jnp.moveaxis(v, 2, 0),
        None if dense_lse is None else jnp.moveaxis(dense_lse.reshape(*groups, tokens), 3, 0),
    )
    _, (out, lse, gone) = jax.lax.scan(step, start, rows)
    b, h = jnp.arange(batch)[:, None], jnp.arange(kv_heads)
    after = jnp.arange(1, tokens + 1, dtype=jnp.int32)[:, None, None]
    leave_row = jnp.full((batch, kv_heads, tokens), tokens, jnp.int32)
    leave_row = leave_row.at[b, h, gone].set(jnp.broadcast_to(after, gone.shape), mode="drop")
    return Kept(jnp.moveaxis(out, 0, 3).reshape(q.shape), _heads_last(lse, heads), leave_row)


def add_low_rank(
    kept: Float[Array, "*R H"],
    lse: Float[Array, "*R"],
    weighted: Float[Array, "*R H"],
    total: Float[Array, "*R"],
) -> Float[Array, "*R H"]:
    """Equation 3: `(weighted + e^lse kept) / (total + e^lse)` without overflow and without floors.

    `weighted` is phi(q) H and `total` phi(q) z. Both sides are scaled by the larger one. Where
    nothing has been evicted the result is `kept`, bit for bit, and gradients are zero, not NaN.
    """
    some = total > NONE
    safe = jnp.where(some, total, 1.0)
    shift = jnp.where(some, jnp.maximum(lse, jnp.log(safe)), lse)
    shift = jax.lax.stop_gradient(shift)  # it cancels
    low = jnp.where(some, jnp.exp(-jnp.where(some, shift, 0.0)), 0.0)
    high = jnp.exp(lse - shift)
    numerator = high[..., None] * kept + low[..., None] * weighted
    return numerator / (high + low * total)[..., None]


def less_attention(
    kept: Kept,
    v: Float[Array, "B K T H"],
    phi: Float[Array, "B N T R"],
    psi: Float[Array, "B K T R"],
) -> Float[Array, "B N T H"]:
    """LESS attention of every row; the reference, with the weights of all pairs of tokens."""
    row = jnp.arange(v.shape[2])[:, None]
    gone = (kept.leave_row[:, :, None] <= row)[:, :, None]
    phi = phi.reshape(phi.shape[0], v.shape[1], -1, *phi.shape[2:])
    weights = jnp.where(gone, jnp.einsum("bkgtr,bksr->bkgts", phi, psi), 0.0)
    weighted = jnp.einsum("bkgts,bksh->bkgth", weights, v).reshape(kept.out.shape)
    return add_low_rank(kept.out, kept.lse, weighted, weights.sum(axis=-1).reshape(kept.lse.shape))


def strided_low_rank(
    phi: Float[Array, "B N M R"], psi: Float[Array, "B K MI R"], v: Float[Array, "B K MI H"]
) -> tuple[Float[Array, "B N M H"], Float[Array, "B N M"]]:
    """`weighted` and `total` of `add_low_rank` for M rows, of which row m (from 0) has lost the
    first (m + 1) I tokens of `psi` and `v`, given in the order of leaving."""
    batch, heads, rows, rank = phi.shape
    kv_heads, width = v.shape[1], v.shape[-1]
    parts = (batch, kv_heads, rows, -1)
    state = jnp.einsum("bkmir,bkmih->bkmrh", psi.reshape(*parts, rank), v.reshape(*parts, width))
    sums = psi.reshape(*parts, rank).sum(axis=3).cumsum(axis=2)
    phi = phi.reshape(batch, kv_heads, -1, rows, rank)
    weighted = jnp.einsum("bkgmr,bkmrh->bkgmh", phi, state.cumsum(axis=2))
    total = jnp.einsum("bkgmr,bkmr->bkgm", phi, sums)
    return weighted.reshape(batch, heads, rows, width), total.reshape(batch, heads, rows)


def leaving_order(leave_row: Int[np.ndarray, "*B K T"], capacity: int) -> np.ndarray:
    """The tokens that the last row no longer sees, first gone first: i64[..., K, T - 1 - C]."""
    gone = max(leave_row.shape[-1] - 1 - capacity, 0)
    return np.argsort(leave_row, axis=-1, kind="stable")[..., :gone]


def _heads_last(x: Float[Array, "T B K G"], heads: int) -> Float[Array, "B N T"]:
    return jnp.moveaxis(x, 0, 3).reshape(x.shape[1], heads, x.shape[0])
