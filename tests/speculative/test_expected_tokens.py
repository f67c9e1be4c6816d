"""Where acceptance depends on the rank alone, steps emit as many tokens as the formula says."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.sampling import Sampler
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.speculative.acceptance_formulas import exact_acceptance, sequoia_acceptance
from jaxinfer.speculative.acceptance_rates import measure_acceptance, rank_acceptance
from jaxinfer.speculative.expected import expected_tokens
from jaxinfer.speculative.speculate import speculate
from jaxinfer.speculative.topology import Topology
from tests.factories import BASE, scripted_lm
from tests.speculative.running import Rows

INDEX = np.arange(8)
TARGET = 3 * np.cos(1.7 * INDEX + 0.3)
DRAFT = TARGET + 1.5 * np.sin(2.3 * INDEX + 1.1)


def context_free(logits: np.ndarray) -> LM:
    """A model that gives the same logits whatever it reads."""
    cfg = replace(BASE, vocab_size=len(logits), num_layers=1)
    params = init_params(cfg, jax.random.key(0))
    one = jnp.ones(cfg.hidden_size)
    head = jnp.asarray(logits, jnp.float32)[:, None] * one / cfg.hidden_size
    zero = jax.tree.map(jnp.zeros_like, params["layers"])
    embed = {"tokens": jnp.tile(one, (len(logits), 1))}
    params |= {"layers": zero, "embed": embed, "head": {"weight": head}}
    return LM(cfg, params, name="context-free")


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def ranks(temperature: float) -> np.ndarray:
    p = exact_acceptance(softmax(TARGET / temperature), softmax(DRAFT / temperature), 8)
    return p / max(p.sum(), 1.0)


@pytest.mark.parametrize(
    "temperature, published",
    [
        pytest.param(0.2, 3.5425, marks=pytest.mark.slow),
        (0.6, 3.3201),
        pytest.param(1.0, 3.2492, marks=pytest.mark.slow),
    ],
)
def test_tokens_per_step_are_the_expected_ones(temperature, published):
    tree = Topology.optimal(ranks(temperature), nodes=16, levels=4)
    expected = expected_tokens(tree, ranks(temperature))
    assert expected == pytest.approx(published, abs=0.004)
    steps = 24
    rows = Rows(speculate(context_free(TARGET), context_free(DRAFT), tree), [1, 2], 1024, 4 * steps)
    rows.limit_steps = steps  # before any row is at its limit, so that no step is cut
    _, state = rows.run(Sampler(temperature=temperature), 0)
    counts = np.asarray(state.speculation.emitted).sum(axis=0)
    assert counts.sum() == 1024 * steps
    measured = (counts * np.arange(len(counts))).sum() / counts.sum()
    assert measured == pytest.approx(expected, rel=0.01)


def test_acceptance_is_measured_as_it_is_computed():
    sampler = Sampler(temperature=0.6)
    found = measure_acceptance(
        context_free(TARGET), context_free(DRAFT), [[1], [2], [3]], sampler, width=5,
        new_tokens=400,
    )  # fmt: skip
    np.testing.assert_allclose(found.p, ranks(0.6)[:5], atol=0.02)
    assert found.samples == 1200


def test_the_sparse_estimator_equals_the_dense_one():
    rng = np.random.default_rng(0)
    target, draft = (np.stack([softmax(row) for row in 2 * rng.normal(size=(64, 8))]) for _ in "ab")
    draws = np.stack([rng.permutation(8)[:5] for _ in target])
    expected = sequoia_acceptance(target, draft, draws)
    order = np.argsort(-draft, axis=1)  # a support lists the likeliest tokens first
    places = np.argmax(order[:, None, :] == draws[..., None], axis=-1)
    found = rank_acceptance(
        jnp.asarray(target, jnp.float32), jnp.asarray(order, jnp.int32),
        jnp.asarray(np.log(np.take_along_axis(draft, order, 1)), jnp.float32),
        jnp.asarray(places, jnp.int32), True,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_greedy_acceptance_counts_the_rank_of_the_targets_choice():
    found = measure_acceptance(
        context_free(TARGET), context_free(DRAFT), [[1]], Sampler(), width=8, new_tokens=16
    )
    order = np.argsort(-DRAFT, kind="stable")
    assert found.p == tuple((order == TARGET.argmax()).astype(float).tolist())


def test_acceptance_counts_the_new_tokens_from_the_first_to_the_last():
    target = scripted_lm([bytes([97 + i]) for i in range(12)])
    # a draft that is wrong behind the prompt's last token, and only there
    embed, head = target.params["embed"]["tokens"], target.params["head"]["weight"]
    wrong = head.at[9].add(2 * embed[0])
    draft = replace(target, params=target.params | {"head": {"weight": wrong}}, name="wrong once")
    found = measure_acceptance(target, draft, [[0]], Sampler(), width=2, new_tokens=8)
    assert found.samples == 8 and found.p[0] == 7 / 8
    # and one that is wrong behind the last new token, which is not asked
    late = replace(
        target, params=target.params | {"head": {"weight": head.at[0].add(2 * embed[8])}},
        name="wrong at the end",
    )  # fmt: skip
    assert measure_acceptance(target, late, [[0]], Sampler(), width=2, new_tokens=8).p[0] == 1
