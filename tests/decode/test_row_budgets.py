"""A row's tokens are its own under every policy and option: its budgets, like all else, come from
itself, not from its neighbours nor from the sizes of buffers."""

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.policy import Policy
from jaxinfer.decode.sampling import Sampler
from jaxinfer.eval.reader import Reader
from jaxinfer.lm import LM
from tests.factories import CONFIGS, lm_of, random_tokens
from tests.policies import over, with_random_feature_maps

LENGTHS = (40, 65, 1)
PROMPTS = [random_tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
WARM = Sampler(temperature=1.2, top_k=30, repetition_penalty=1.1, logit_bias={3: -2.0})
POLICIES = {
    "full": ji.full,
    "kivi": lambda: ji.kivi(bits=4, group=8, residual=8),
    "streaming": lambda: ji.streaming(2, 13),
    "h2o in tokens": lambda: ji.h2o(4, 6),
    "h2o": lambda: ji.h2o(0.1, 0.2),
    "less": lambda: with_random_feature_maps(over(ji.h2o(0.2, 0.1)), CONFIGS["llama"]),
    "by layer": lambda: by_layer(),
}


def by_layer() -> Policy:
    count = CONFIGS["llama"].num_layers
    return ji.per_layer([ji.h2o(0.3, 0.1), *[ji.h2o(0.1, 0.3)] * (count - 2), ji.full()])


@pytest.fixture(scope="module")
def lm() -> LM:
    return lm_of("llama")


@pytest.mark.parametrize(
    "name", [n if n == "less" else pytest.param(n, marks=pytest.mark.slow) for n in POLICIES]
)
def test_a_row_alone_is_that_row_in_a_batch(lm, name):
    policy = POLICIES[name]()
    options = {"max_new_tokens": [12, 5, 8], "sampler": [WARM, Sampler(), WARM], "seed": [1, 2, 3]}
    outs = lm.generate(PROMPTS, samples=2, policy=policy, **options)
    for row in (0, 2):  # the longest prompt has the batch's own buckets
        own = {key: value[row] for key, value in options.items()}
        alone = lm.generate([PROMPTS[row]], samples=2, policy=policy, **own)
        assert [out.tokens for out in alone] == [out.tokens for out in outs[2 * row : 2 * row + 2]]


def test_a_share_keeps_as_many_tokens_as_it_says(lm):
    """Of 40, 65 and 1 tokens 10 % are 4, 6 and 1, and 20 % are 8, 13 and 1."""
    outs = lm.generate(PROMPTS, policy=ji.h2o(0.1, 0.2), max_new_tokens=12)
    for row, (heavy, recent) in enumerate([(4, 8), (6, 13), (1, 1)]):
        whole = lm.generate([PROMPTS[row]], policy=ji.h2o(heavy, recent), max_new_tokens=12)[0]
        assert whole.tokens == outs[row].tokens
        np.testing.assert_allclose(whole.log_probs, outs[row].log_probs, atol=1e-4)


def test_a_text_that_is_scored_is_its_own_context(lm):
    policies = ji.h2o(0.1, 0.2), ji.h2o(6, 13)
    found, expected = (lm.score([PROMPTS[1]], policy=policy)[0] for policy in policies)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
    read = Reader(lm, ji.h2o(0.1, 0.2), context=65).read([PROMPTS[1]])
    np.testing.assert_allclose(read.log_probs[0], expected.log_probs, atol=1e-4)


def test_the_memory_is_that_of_the_longest_prompts_bucket(lm):
    out = lm.generate(PROMPTS, policy=ji.h2o(0.1, 0.2), max_new_tokens=2)[0]
    most = lm.generate(PROMPTS, policy=ji.h2o(12, 25), max_new_tokens=2)[0]  # of 128 tokens
    layers, tiers = lm.config.num_layers, 2
    budgets = 4 * layers * tiers * len(PROMPTS)
    assert out.stats.cache_bytes == most.stats.cache_bytes + budgets
