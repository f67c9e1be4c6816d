"""What a drafter proposes for a tree, and how children are drawn from its distributions.

Letters: N nodes with the root; I nodes that have children; M tokens of a draft's support.

A draft distribution is kept as the logits of its M likeliest tokens and is zero elsewhere.
Verification (arXiv 2402.12374, algorithm 2) is lossless for any distribution, as long as the
children were drawn from the very same one; noise, draws and residuals then cost M and not V.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.decode.sampling import SamplerRows, penalised
from jaxinfer.decode.settings import LARGEST
from jaxinfer.typing import Leaf

Draws = Literal["without_replacement", "with_replacement", "top"]
FLOOR = -200.0  # log-probability of what has none: drawn only when everything else was
USED = -1e30  # of a token that was drawn before


class Proposal(NamedTuple):
    """`ids` and `logits` describe the draft distribution of branching node i: distinct tokens, and
    any number beyond the vocabulary for places that are not used. `picks` is the place of a node's
    token in the support of its parent (0 for the root)."""

    tokens: Leaf  # i32[B, N], the root first
    picks: Leaf  # i32[B, N]
    ids: Leaf  # i32[B, I, M]
    logits: Leaf  # f32[B, I, M]


def support(
    logits: Float[Array, "B W V"],
    size: int,
    sampler: SamplerRows,
    seen: Array,
    vocab: Int[Array, " V"] | None = None,
) -> tuple[Int[Array, "B W M"], Float[Array, "B W M"]]:
    """Ids and log-probabilities of the draft's `size` likeliest tokens, by the sampler's settings,
    the likeliest first.

    `seen` i32[B, W, V'] is that of `DecodeState` at a node, [B, 1, 1] without a penalty.
    `vocab` names the tokens of a draft with a reduced vocabulary. Rows with temperature 0 get the
    distribution of temperature 1: it orders their children, and any verifies a one-hot target.
    """
    best, ids = jax.lax.top_k(logits, min(size, logits.shape[-1]))
    ids = ids.astype(jnp.int32) if vocab is None else vocab[ids]
    features, column = sampler.features, (slice(None), None, None)
    if features.bias:
        hit = ids[..., None] == sampler.bias_tokens[:, None, None]
        best = best + jnp.where(hit, sampler.bias_values[:, None, None], 0.0).sum(axis=-1)
    if features.penalty:
        used = jnp.take_along_axis(seen, ids, axis=-1)
        columns = (x[column] for x in (sampler.penalty, sampler.presence, sampler.frequency))
        best = penalised(best, used, *columns)
    if features.bias or features.penalty:
        best, order = jax.lax.top_k(best, best.shape[-1])
        ids = jnp.take_along_axis(ids, order, axis=-1)
    if not features.sample:
        return ids, best
    width = best.shape[1]
    # Where every token of the support is forbidden any distribution will do, as the target draws
    # none of them; a sampler must have one that is not.
    flat = jnp.maximum(best, -LARGEST).reshape(-1, best.shape[-1])
    rows = drafting(sampler, width)
    log_q = rows.log_probs(flat, jnp.zeros((len(flat), 1), bool)).reshape(best.shape)
    return ids, jnp.maximum(log_q, FLOOR)


def drafting(sampler: SamplerRows, width: int) -> SamplerRows:
    """The sampler of `width` nodes per row, for a support to which bias and penalty were applied;
    greedy rows draw as at temperature 1, without filters."""
    greedy = sampler.temperature <= 0
    rows = SamplerRows(
        temperature=jnp.where(greedy, 1.0, sampler.temperature),
        top_k=jnp.where(greedy, 0, sampler.top_k),
        top_p=jnp.where(greedy, 1.0, sampler.top_p),
        min_p=jnp.where(greedy, 0.0, sampler.min_p),
        penalty=sampler.penalty,
        presence=sampler.presence,
        frequency=sampler.frequency,
        bias_tokens=sampler.bias_tokens,
        bias_values=sampler.bias_values,
        features=sampler.features._replace(penalty=False, bias=False, mask=False),
    )
    return jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), rows)


def draw_children(
    draws: Draws,
    keys: Array,
    logits: Float[Array, "B W M"],
    sampler: SamplerRows,
    count: int,
) -> Int[Array, "B W C"]:
    """Places in the support (the likeliest first) of `count` children per node, as they are drawn.

    The descending order of logit + Gumbel noise is exactly that of sampling one after the other
    without replacement: each token rings after an exponential time at the rate of its probability,
    and what has not rung yet starts anew. With replacement every child has noise of its own. Greedy
    rows, and "top", take the likeliest. `keys` [B] are the rows' keys.
    """
    best = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (*logits.shape[:2], count))
    if draws == "top" or not sampler.features.sample:
        return best
    shape = logits.shape[1:] if draws == "without_replacement" else (count, *logits.shape[1:])
    noise = jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)
    greedy = sampler.temperature <= 0
    if draws == "without_replacement":
        noise = jnp.where(greedy[:, None, None], 0.0, noise)
        return jax.lax.top_k(logits + noise, count)[1].astype(jnp.int32)
    drawn = jnp.argmax(logits[:, None] + noise, axis=-1).transpose(0, 2, 1)
    return jnp.where(greedy[:, None, None], best, drawn).astype(jnp.int32)
