"""Runs the speculative loop on rows that share a prompt, without tokenizers or buckets."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.presets import full
from jaxinfer.config import RopeConfig
from jaxinfer.decode.engine import make_requests, seen_tokens
from jaxinfer.decode.sampling import Sampler
from jaxinfer.io.draft import BorrowingDraft
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.models.recurrent import RecurrentConfig, RecurrentDraft, init_cell
from jaxinfer.speculative.drafters import ModelState
from jaxinfer.speculative.drafts import early_exit
from jaxinfer.speculative.lookup import LookupState
from jaxinfer.speculative.speculate import speculate
from jaxinfer.speculative.step import TreeStep
from jaxinfer.speculative.topology import Topology
from tests.factories import BASE

TREE = Topology.from_children([[[[]], []], [[]], []])  # 8 nodes, 4 levels
VOCAB = 6


def toy(seed: int = 0) -> LM:
    """A model of two layers and six tokens, loud enough that its distributions are uneven."""
    cfg = replace(
        BASE, vocab_size=VOCAB, hidden_size=16, num_heads=2, num_kv_heads=1, num_layers=2,
        rope=RopeConfig(rotary_dim=8),
    )  # fmt: skip
    params = init_params(cfg, jax.random.key(seed), jnp.float32)
    params = jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, params)
    head = params["head"]["weight"]
    return LM(cfg, params | {"head": {"weight": 0.7 * head}}, name=f"toy{seed}")


TARGET = toy()


def cell(tokens: tuple[int, ...] = (0, 1, 2, 4, 5), blocks: int = 1) -> RecurrentDraft:
    """A random recurrent draft for `TARGET` that knows some tokens only."""
    cfg = RecurrentConfig(
        hidden_size=16, intermediate_size=24, blocks=blocks, vocab_size=len(tokens)
    )  # fmt: skip
    borrowing = BorrowingDraft(cfg, init_cell(cfg, jax.random.key(7)), np.asarray(tokens), "", "")
    return RecurrentDraft(cfg, borrowing.full_params(TARGET.params))


DRAFTS = {
    "early exit": early_exit(TARGET, 1),
    "unrelated": toy(5),
    "itself": TARGET,
    "recurrent": cell(),
}


class Rows:
    """Many rows behind one prompt, drawn by `speculator`; the loop is compiled once."""

    def __init__(self, speculator, prompt, rows: int, new: int):
        self.spec, self.prompt, self.rows, self.new = speculator, list(prompt), rows, new
        self.step = TreeStep(topology=speculator.topology, drafter=speculator.drafter)
        self.limit_steps = 1000
        self.room = 32 if new < 16 else 128

    def run(self, sampler: Sampler, seed: int):
        """(tokens [rows, new], the final state)."""
        lm, rows, prompt = self.spec.target, self.rows, self.prompt
        seeds = range(seed * rows, (seed + 1) * rows)
        one = make_requests([sampler], [0], [self.new], (), lm.config.vocab_size)
        requests = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), one)
        keys = jax.vmap(jax.random.key)(jnp.asarray(list(seeds), jnp.uint32))
        requests = replace(requests, keys=keys)
        engine = lm.engine

        def read(model: LM, tokens):
            cache = model.engine.new_cache(full(), 1, self.room)
            cache, logits = model.engine.prefill(cache, None, [tokens], empty=True)
            return jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), (cache, logits))

        cache, logits = read(lm, prompt)
        seen = seen_tokens(one, [prompt], lm.config.vocab_size)
        seen = jnp.repeat(seen, rows, axis=0)
        state = engine.init_state(cache, logits, requests, seen, self.new)
        draft = self.spec.draft
        if draft is not None:
            engine = replace(engine, params=engine.params | {"draft": draft.params})
        if isinstance(draft, RecurrentDraft):
            drafter = jnp.zeros((rows, draft.config.hidden_size))
        elif draft is None:
            history = np.zeros((rows, self.room), np.int32)
            history[:, : len(prompt)] = prompt
            history[:, len(prompt)] = np.asarray(state.token)
            drafter = LookupState(
                jnp.asarray(history), jnp.full((rows,), len(prompt) + 1, jnp.int32)
            )
        else:
            last = jnp.full((rows,), prompt[-1], jnp.int32)
            drafter = ModelState(read(draft, prompt[:-1])[0], last)
        state = replace(state, speculation=self.step.init_state(drafter, rows))
        state = engine.decode(requests, state, self.limit_steps, step=self.step)
        return np.asarray(state.tokens)[:, : self.new], state


def speculator(draft: str, method: str = "sequoia", topology: Topology = TREE):
    if draft == "lookup":
        return speculate(TARGET, "prompt-lookup", topology)
    return speculate(TARGET, DRAFTS[draft], topology, method=method)


def joint(sampler: Sampler, prompt, length: int) -> np.ndarray:
    """The exact distribution of the next `length` tokens, f64[V, ..., V], by enumeration."""
    shape = (VOCAB,) * length
    sequences = np.stack(np.unravel_index(np.arange(VOCAB**length), shape), axis=1)
    tokens = np.concatenate([np.tile(prompt, (len(sequences), 1)), sequences], axis=1)
    logits = np.asarray(TARGET.logits(tokens))
    probability = np.ones(len(sequences))
    for i in range(length):
        end = len(prompt) + i
        counts = np.stack([np.bincount(row[:end], minlength=VOCAB) for row in tokens])
        log_probs = sampler.log_probs(jnp.asarray(logits[:, end - 1]), jnp.asarray(counts))
        probability *= np.exp(np.asarray(log_probs, np.float64))[
            np.arange(len(sequences)), sequences[:, i]
        ]
    return probability.reshape(shape) / probability.sum()


def compare(drawn: np.ndarray, expected: np.ndarray) -> tuple[float, float, float]:
    """(total variation, the one that sampling noise alone would give, z of the chi square)."""
    flat = np.ravel_multi_index(tuple(drawn.T), expected.shape)
    counts = np.bincount(flat, minlength=expected.size)
    e, n = expected.ravel(), len(drawn)
    assert counts[e < 1e-30].sum() == 0, "a token of probability 0 was emitted"
    distance = 0.5 * np.abs(counts / n - e).sum()
    floor = 0.5 * np.sqrt(2 / np.pi) * np.sqrt(e * (1 - e) / n).sum()
    common = e * n >= 5  # the rare ones are one cell
    cells = np.append(counts[common], counts[~common].sum()).astype(float)
    means = np.append(e[common], e[~common].sum()) * n
    keep = means > 0
    chi, degrees = ((cells - means)[keep] ** 2 / means[keep]).sum(), max(keep.sum() - 1, 1)
    return distance, floor, (chi - degrees) / np.sqrt(2 * degrees)
