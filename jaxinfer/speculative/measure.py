"""Measures what the choice of a tree needs: acceptance on the target's own text, and times.

Acceptance is measured by the Rao-Blackwell estimator (arXiv 2402.12374, section 3.2): children are
drawn, but instead of accepting or rejecting them their probabilities of it are added up, which
needs some fifty times fewer samples than counting.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.decode.options import Options
from jaxinfer.decode.run import Run
from jaxinfer.decode.sampling import Sampler, SamplerRows
from jaxinfer.lm import LM
from jaxinfer.models.recurrent import RecurrentConfig, RecurrentDraft, guesses, read
from jaxinfer.models.stack import forward
from jaxinfer.nn.quantized import size_of
from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.proposal import USED, draw_children, support
from jaxinfer.speculative.speculate import PROMPT_LOOKUP, Speculator, speculate
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.verify import Residual
from jaxinfer.typing import Params

POSITIONS = 64  # whose logits exist at a time
DEPTHS = 8  # to which a recurrent draft is measured
SIZES = (2, 3, 4, 6, 8, 12, 16)  # of trees whose verification is timed on a CPU
STEPS, LARGE = 32, 30_000_000  # that are timed at once; a quarter of them for larger models
ROUNDS = 15  # of timing; a third of them for larger models
PASSES = 4  # draft passes of the chain whose time, without the verification's, gives one pass


def measure_acceptance(
    target: LM,
    draft: LM | RecurrentDraft,
    prompts: Sequence[Any],
    sampler: Sampler,
    *,
    width: int = 16,
    new_tokens: int = 64,
    size: int = 64,
    seed: int = 0,
) -> Acceptance:
    """How often the k-th child is the accepted one, on text that the target writes after `prompts`.

    `size` is the support of the draft's distribution, as in `speculate`. At temperature 0 the
    children are the draft's likeliest tokens, and p_k how often rank k is the target's choice. A
    recurrent draft knows less the deeper it guesses: its ranks are measured by depth.
    """
    rows = [target.encode(prompt) for prompt in prompts]
    made = target.generate(
        rows, sampler=sampler, max_new_tokens=new_tokens, seed=list(range(seed, seed + len(rows)))
    )
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
            jax.random.fold_in(jax.random.key(seed), number),
        )  # fmt: skip
        # The logits behind the prompt's last token chose the first new one.
        own = np.asarray(found)[:, len(row) - 1 : len(row) - 1 + len(one.tokens)]
        total, count = total + own.sum(axis=1), count + own.shape[1]
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
    target: LM,
    prompts: Sequence[Any],
    sampler: Sampler,
    topology: Topology,
    *,
    draft: "LM | str" = PROMPT_LOOKUP,
    new_tokens: int = 64,
    seed: int = 0,
) -> Acceptance:
    """How often each rank is accepted at each depth, counted while speculating with `topology`.

    Depths that were hardly reached are left out.
    """
    plan = speculate(target, draft, topology)
    counts = np.zeros((1, 1), np.int64)
    for number, prompt in enumerate(prompts):
        run = Run(
            target,
            [prompt],
            Options(sampler=sampler, max_new_tokens=new_tokens, seed=seed + number, draft=plan),
        )
        run.finish()
        assert run.state is not None
        counts = counts + np.asarray(run.state.speculation.chosen)
    tried = counts.sum(axis=1)
    reached = max(int((tried >= 8).sum()), 1)
    p = counts[:reached, :-1] / np.maximum(tried[:reached, None], 1)
    return Acceptance(
        p=tuple(tuple(row) for row in p.tolist()),
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        pair=(target.name, draft if isinstance(draft, str) else draft.name),
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
    unseen = jnp.zeros((POSITIONS, 1, 1), bool)

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


def measure_times(
    target: LM,
    draft: LM | RecurrentDraft | None,
    sampler: Sampler,
    *,
    policy: Any = None,
    draft_policy: Any = None,
    sizes: Sequence[int] = SIZES,
    context: int = 128,
) -> tuple[dict[int, float], float]:
    """Milliseconds of a step with n nodes for each n of `sizes` (1: plain decoding), and of one
    draft pass, for one row behind `context` tokens.

    The target's part is timed with prompt lookup, whose drafting costs nothing: reading n nodes,
    the verdict, the commit.
    """
    trees = {n: Topology.chain(n) for n in sizes}
    plans: dict[Any, Speculator | None] = {1: None}
    plans |= {n: speculate(target, "prompt-lookup", tree) for n, tree in trees.items()}
    if draft is not None:
        deep = Topology.chain(PASSES + 1)
        plans["drafted"] = speculate(target, draft, deep, policy=draft_policy)
        plans["alone"] = speculate(target, "prompt-lookup", deep)
    plain, cost = _in_plain_steps(target, plans, sampler, policy, context)
    passes = 0.0
    if draft is not None:
        passes = max(plain * (cost.pop("drafted") - cost.pop("alone")) / PASSES, 1e-3)
    return {n: plain * steps for n, steps in cost.items()}, passes


def measure_step(
    target: LM,
    draft: LM | RecurrentDraft,
    sampler: Sampler,
    topology: Topology,
    *,
    policy: Any = None,
    draft_policy: Any = None,
    context: int = 128,
) -> float:
    """The time of a whole step with this tree in plain steps."""
    plans = {1: None, "tree": speculate(target, draft, topology, policy=draft_policy)}
    return _in_plain_steps(target, plans, sampler, policy, context)[1]["tree"]


def _in_plain_steps(
    target: LM, plans: dict[Any, Speculator | None], sampler: Sampler, policy: Any, context: int
) -> tuple[float, dict[Any, float]]:
    """Milliseconds of plan 1, plain decoding, and the cost of a step of each plan in plain ones.

    Medians over interleaved rounds, of ratios within a round: a machine whose clock changes does
    not keep one speed for as long as all of them take.
    """
    runs = {name: _steps(target, plan, sampler, policy, context) for name, plan in plans.items()}
    for step in runs.values():
        step()  # compiles
    rounds = ROUNDS if size_of(target.params) < LARGE else ROUNDS // 3
    times = [{name: step() for name, step in runs.items()} for _ in range(rounds)]
    cost = {name: statistics.median(found[name] / found[1] for found in times) for name in plans}
    return statistics.median(found[1] for found in times), cost


def _steps(
    target: LM, plan: Speculator | None, sampler: Sampler, policy: Any, context: int
) -> Callable[[], float]:
    """A function that runs a few steps and returns the milliseconds of one."""
    cfg = target.config
    steps = STEPS if size_of(target.params) < LARGE else STEPS // 4
    context = min(context, cfg.max_positions // 4)
    new = min(256, cfg.max_positions // 2)
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, context).tolist()
    options = Options(
        policy=policy, sampler=sampler, max_new_tokens=new, draft=plan, ignore_eos=True
    )

    def once() -> float:
        run = Run(target, [prompt], options)
        pieces = run.pieces(steps)
        next(pieces)
        before, first = run.times["decode"], run.steps
        next(pieces)  # a text may end before so many steps
        return 1000 * (run.times["decode"] - before) / (run.steps - first)

    return once
