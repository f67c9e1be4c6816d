"""How often a draft's guesses are accepted, measured on the target's own text.

By the Rao-Blackwell estimator (arXiv 2402.12374, section 3.2): children are drawn, but instead of
accepting or rejecting them their probabilities of it are added up, which needs some fifty times
fewer samples than counting.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.decode.generate import generate
from jaxinfer.decode.model import Model, Prompt
from jaxinfer.decode.options import Options
from jaxinfer.decode.run import Run
from jaxinfer.decode.sampling import Sampler, SamplerRows
from jaxinfer.decode.settings import random_key
from jaxinfer.models.recurrent import RecurrentConfig, RecurrentDraft, guesses, read
from jaxinfer.models.stack import forward
from jaxinfer.progress import Report, silent
from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.drafts import PROMPT_LOOKUP
from jaxinfer.speculative.proposal import USED, draw_children, support
from jaxinfer.speculative.speculator import Speculator
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.verify import Residual
from jaxinfer.typing import Params

ACCEPTANCE = "measuring acceptance"
POSITIONS = 64  # whose logits exist at a time
DEPTHS = 8  # to which a recurrent draft is measured


def measure_acceptance(
    target: Model,
    draft: Model | RecurrentDraft,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    *,
    width: int = 16,
    new_tokens: int = 64,
    size: int = 64,
    seed: int = 0,
    report: Report = silent,
) -> Acceptance:
    """How often the k-th child is the accepted one, on text that the target writes after `prompts`.

    `size` is the support of the draft's distribution, as in `speculate`. At temperature 0 the
    children are the draft's likeliest tokens, and p_k how often rank k is the target's choice. A
    recurrent draft knows less the deeper it guesses: its ranks are measured by depth.
    """
    rows = [target.encode(prompt) for prompt in prompts]
    seeds = list(range(seed, seed + len(rows)))
    report(ACCEPTANCE, 0, len(rows))
    made = generate(target, rows, Options(sampler=sampler, max_new_tokens=new_tokens, seed=seeds))
    size = min(size, draft.config.vocab_size)
    width = min(width, size)
    total, count = np.zeros((1, width)), 0
    longest = max(len(row) + len(one.tokens) for row, one in zip(rows, made, strict=True))
    length = -(-longest // POSITIONS) * POSITIONS
    for number, (row, one) in enumerate(zip(rows, made, strict=True)):
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(row) + len(one.tokens)] = row + one.tokens
        found = _along(
            target.config, draft.config, size, width, target.params, draft.params,
            jnp.asarray(tokens), SamplerRows.of([sampler], target.config.vocab_size),
            jax.random.fold_in(random_key(seed), number),
        )  # fmt: skip
        # The logits behind the prompt's last token chose the first new one.
        own = np.asarray(found)[:, len(row) - 1 : len(row) - 1 + len(one.tokens)]
        total, count = total + own.sum(axis=1), count + own.shape[1]
        report(ACCEPTANCE, number + 1, len(rows))
    p = np.clip(total / count, 0, 1)
    p = p / np.maximum(p.sum(axis=1, keepdims=True), 1.0)
    return Acceptance(
        p=tuple(p[0].tolist()) if len(p) == 1 else tuple(map(tuple, p.tolist())),
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        pair=(target.name, draft.name),
        samples=count,
        seed=seed,
    )


def online_acceptance(
    target: Model,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    topology: Topology,
    *,
    draft: Model | RecurrentDraft | None = None,
    new_tokens: int = 64,
    seed: int = 0,
    report: Report = silent,
) -> Acceptance:
    """How often each rank is accepted at each depth, counted while speculating with `topology`.

    `draft` None is prompt lookup. Depths that were hardly reached are left out.
    """
    speculator = Speculator.of(target, draft, topology)
    counts = np.zeros((1, 1), np.int64)
    for number, prompt in enumerate(prompts):
        run = Run(
            target,
            [prompt],
            Options(
                sampler=sampler, max_new_tokens=new_tokens, seed=seed + number, draft=speculator
            ),
        )
        run.finish()
        assert run.state is not None
        counts = counts + np.asarray(run.state.speculation.chosen).sum(axis=0)
        report(ACCEPTANCE, number + 1, len(prompts))
    tried = counts.sum(axis=1)
    reached = max(int((tried >= 8).sum()), 1)
    p = counts[:reached, :-1] / np.maximum(tried[:reached, None], 1)
    return Acceptance(
        p=tuple(tuple(row) for row in p.tolist()),
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        pair=(target.name, PROMPT_LOOKUP if draft is None else draft.name),
        samples=int(tried[0]),
        seed=seed,
    )


@jax.jit(static_argnums=(0, 1, 2, 3))
def _along(
    cfg: ModelConfig,
    draft_cfg: ModelConfig | RecurrentConfig,
    size: int,
    width: int,
    params: Params,
    draft_params: Params,
    tokens: Int[Array, "1 T"],
    sampler: SamplerRows,
    key: Array,
) -> Float[Array, "L T W"]:
    """Acceptance of each rank at every position of a text, by depth where it matters."""
    out = forward(cfg, params, tokens)
    logits, vocabulary = out.logits[0], draft_params.get("draft_vocabulary")
    rows = jax.tree.map(lambda x: jnp.repeat(x, POSITIONS, axis=0), sampler)
    unseen = jnp.zeros((POSITIONS, 1, 1), jnp.int32)

    def piece(inputs: tuple[Array, Array, Array]) -> Array:
        logits, guesses, key = inputs
        target = jnp.exp(rows.log_probs(logits, unseen[:, 0]))
        ids, log_q = support(guesses[:, None], size, rows, unseen, vocabulary)
        keys = jax.random.split(key, POSITIONS)
        picks = draw_children("without_replacement", keys, log_q, rows, width)[:, 0]
        return rank_acceptance(target, ids[:, 0], log_q[:, 0], picks, sampler.features.sample)

    def at_depth(guesses: Array, key: Array) -> Array:
        pieces = (x.reshape(-1, POSITIONS, x.shape[-1]) for x in (logits, guesses))
        keys = jax.random.split(key, len(logits) // POSITIONS)
        return jax.lax.map(piece, (*pieces, keys)).reshape(-1, width)

    if isinstance(draft_cfg, ModelConfig):
        readable = jnp.minimum(tokens, draft_cfg.vocab_size - 1)
        return at_depth(forward(draft_cfg, draft_params, readable).logits[0], key)[None]
    found, state = [], out.hidden.astype(jnp.float32)
    for depth, own_key in enumerate(jax.random.split(key, DEPTHS)):
        # the cell at position t has read the `depth` + 1 tokens up to t, from the state before
        state = read(draft_params, jnp.roll(state, 1, axis=1).at[:, : depth + 1].set(0.0), tokens)
        found.append(at_depth(guesses(draft_params, state)[0], own_key))
    return jnp.stack(found)


def rank_acceptance(
    target: Float[Array, "B V"],
    ids: Int[Array, "B M"],
    log_q: Float[Array, "B M"],
    picks: Int[Array, "B W"],
    samples: bool,
) -> Float[Array, "B W"]:
    """The probability that each of the drawn children is the accepted one."""
    rows = jnp.arange(len(target))
    if not samples:  # a one-hot target accepts the child that it names
        return jnp.take_along_axis(target, jnp.take_along_axis(ids, picks, axis=1), axis=1)
    outside = target.at[rows[:, None], ids].set(0.0).sum(axis=-1)
    residual = Residual(jnp.take_along_axis(target, ids, axis=-1), jnp.ones(len(target)))
    alive, found = jnp.ones(len(target)), []
    for place in picks.T:
        offered = jax.nn.softmax(log_q, axis=-1)
        accepts = jnp.minimum(residual.inside[rows, place] / offered[rows, place], 1.0)
        found.append(alive * accepts)
        alive = alive * (1 - accepts)
        residual = residual.without(offered, outside)
        log_q = log_q.at[rows, place].set(USED)
    return jnp.stack(found, axis=1)
