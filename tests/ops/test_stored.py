"""A model whose cache is read by kernels (interpreted) writes the text of one that is not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.presets import full, h2o, kivi, streaming
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.speculative.speculate import speculate
from jaxinfer.speculative.topology import Topology

CFG = ModelConfig(
    family="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=16, max_positions=512, rope=RopeConfig(rotary_dim=16),
)  # fmt: skip
POLICIES = {
    "full": full(),
    "kivi": kivi(bits=2, group=16, residual=16),
    "h2o": h2o(heavy=4, recent=6),
    "streaming": streaming(sinks=2, window=9),
}
PROMPTS = [list(range(3, 40)), [7, 1, 8], list(range(30, 9, -1))]


def model(cfg: ModelConfig = CFG, **options) -> LM:
    return LM(cfg, init_params(cfg, jax.random.key(0)), **options)


@pytest.mark.parametrize(
    "name",
    [
        "kivi",
        "full",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("h2o", "streaming")),
    ],
)
def test_kernels_give_the_text_of_the_reference(name):
    options = {"max_new_tokens": 12, "policy": POLICIES[name], "ignore_eos": True}
    wanted = model().generate(PROMPTS, **options)
    given = model(implementation="interpret").generate(PROMPTS, **options)
    for a, b in zip(wanted, given, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "kivi"])
def test_kernels_read_a_cache_for_a_tree_with_alibi_or_a_window(name):
    biased = replace(CFG, positions="alibi", rope=None, alibi_slopes=(0.5, 0.25, 0.125, 0.06))
    windowed = replace(CFG, sliding_windows=(11,))
    tree = Topology.k_chains(2, 2)
    for cfg in (biased, windowed):
        options = {"max_new_tokens": 12, "policy": POLICIES[name], "ignore_eos": True}
        lm = model(cfg, implementation="interpret")
        wanted = model(cfg).generate(PROMPTS, **options)
        # sliding values are not lossless under trees
        drafts = [None] if name == "kivi" else [None, speculate(lm, "prompt-lookup", tree)]
        for draft in drafts:
            given = lm.generate(PROMPTS, draft=draft, **options)
            assert [one.tokens for one in given] == [one.tokens for one in wanted]


def test_a_named_kernel_is_not_replaced_by_the_reference():
    lm = model(implementation="interpret")
    with pytest.raises(ValueError, match="the kernels read 2-, 4- and 8-bit keys per channel"):
        policy = kivi(bits=2, group=16, residual=16, key_grouping="token")
        lm.generate(PROMPTS, policy=policy, max_new_tokens=2)


def test_without_a_name_a_cpu_gets_what_it_always_got():
    cache = model().engine.new_cache(full(), 1, 64)
    assert cache.layers[0][0].layout == "BKHS"
    assert jnp.asarray(cache.layers[0][0].k).shape == (1, 2, 16, 64)
