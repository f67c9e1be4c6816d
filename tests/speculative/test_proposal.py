"""The tokens that a draft distribution is kept as, and their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.sampling import Sampler, SamplerRows
from jaxinfer.speculative.proposal import support
from tests.speculative.running import DRAFTS, TREE, speculator

LOGITS = jnp.asarray([2.0, 1.0, 0.5, -1.0, -2.0])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({}, [0, 1, 2, 3]),
        ({"repetition_penalty": 8.0}, [1, 2, 0, 3]),  # 0 was seen: 2 / 8
        ({"logit_bias": ((3, 9.0), (1, -0.8))}, [3, 0, 2, 1]),
    ],
)
def test_the_support_has_the_likeliest_first_also_behind_a_penalty_or_a_bias(
    settings, order, temperature
):
    sampler = SamplerRows.of([Sampler(temperature=temperature, **settings)], 5)
    seen = jnp.asarray([True, False, False, False, False])[None, None]
    ids, log_q = support(LOGITS[None, None], 4, sampler, seen)
    assert ids[0, 0].tolist() == order
    assert bool((jnp.diff(log_q[0, 0]) <= 0).all())


@pytest.mark.parametrize(
    ("sampler", "tokens"),
    [(Sampler(), TREE.branching), (Sampler(repetition_penalty=2), 5), (Sampler(temperature=1), 5)],
)
def test_a_greedy_tree_asks_for_no_more_tokens_than_a_node_has_children(sampler, tokens):
    draft, spec = DRAFTS["recurrent"], speculator("recurrent")
    proposal, _ = spec.drafter.propose(
        draft.params, TREE, SamplerRows.of([sampler], 6),
        jax.random.split(jax.random.key(0), 1), jnp.ones((1, 16)), jnp.asarray([2]),
        jnp.zeros((1, 6), jnp.int32),
    )  # fmt: skip
    assert proposal.ids.shape == (1, np.count_nonzero(TREE.child_count), tokens)
