"""`ji.less`: over which policies, with which feature maps, and how a prompt is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.feature_maps import LessConfig, LessFeatureMaps
from jaxinfer.models.fingerprint import fingerprint
from tests.factories import lm_of, random_tokens
from tests.policies import random_feature_maps

LM = lm_of("llama")
RANK = 3
TOKENS = random_tokens(2, 40)
BASES = {
    "h2o": ji.h2o(4, 3),
    "streaming": ji.streaming(2, 6, positions="absolute"),
    "in_cache": ji.streaming(2, 6),
}


def maps(scale: float = 1.0, hidden: int = 8) -> LessFeatureMaps:
    config = LessConfig.of(
        LM.config, fingerprint(LM.params), model="test", hidden=hidden, rank=RANK
    )
    silent = {"scale", "mix_scale"} if scale == 0 else set()
    layers = tuple(
        {"feature_map": {n: jnp.zeros_like(x) if n in silent else x for n, x in layer.items()}}
        for layer in (layer["feature_map"] for layer in random_feature_maps(LM.config).layers)
    )
    return LessFeatureMaps(config, layers)


def log_probs(policy) -> np.ndarray:
    found = LM.score([TOKENS[0].tolist()], policy=policy, chunk=1)[0].log_probs
    return np.asarray(found)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_feature_maps_of_zero_change_no_number_of_a_model(base):
    np.testing.assert_array_equal(log_probs(ji.less(base, maps(0))), log_probs(base))
    assert np.abs(log_probs(ji.less(base, maps())) - log_probs(base)).max() > 1e-3


def test_every_layer_gets_its_own_feature_maps():
    policy = ji.less(BASES["h2o"], maps())
    layers = LM.engine.serving(policy).params["layers"]
    for layer, own, before in zip(
        layers, policy.feature_maps.layers, LM.params["layers"], strict=True
    ):
        assert layer["attn"]["cache"] is own
        assert layer["mlp"] is before["mlp"] and "cache" not in before["attn"]


@pytest.mark.parametrize("name", BASES)
def test_how_a_prompt_is_read(name):
    """Over positions in the text at once and dense, over those in the cache in whole windows."""
    base, prompt = BASES[name], TOKENS[0, :30].tolist()

    def first_logits(policy):
        engine = LM.engine.serving(policy)
        cache = engine.new_cache(policy, 1, 64)
        return np.asarray(engine.prefill(cache, None, [prompt], empty=True)[1])

    found = first_logits(ji.less(base, maps()))
    dense = first_logits(ji.full())
    if name == "in_cache":
        assert np.abs(found - dense).max() > 1e-2
        assert np.abs(found - first_logits(base)).max() > 1e-3  # the state took part
    else:
        np.testing.assert_allclose(found, dense, rtol=0, atol=2e-4)


def test_of_a_list_the_layers_that_evict_get_the_state():
    mixed = ji.less([ji.h2o(4, 3), ji.full()], maps())
    assert [policy.name for policy in mixed.layers] == ["less-h2o", "full"]
    listed = [ji.less(ji.h2o(4, 3), maps()), ji.full()]
    for policy in (mixed, listed):
        (out,) = LM.generate([TOKENS[0, :20].tolist()], policy=policy, max_new_tokens=8)
        assert len(out.tokens) == 8


def test_a_base_may_be_given_by_name():
    by_name = ji.less("streaming", maps(), sinks=2, window=6, positions="absolute")
    assert by_name == ji.less(BASES["streaming"], maps())
    assert ji.less(feature_maps=maps()).tiers[:2] == ji.h2o(51, 51).tiers
    assert ji.less(feature_maps=maps(), heavy=9).tiers[:2] == ji.h2o(9, 51).tiers


def test_what_does_not_fit_is_refused():
    made = ji.less(ji.h2o(4, 3), maps())
    for base in (ji.full(), ji.kivi(), [ji.full(), ji.full()]):
        with pytest.raises(ValueError, match="evicts nothing that LESS could absorb"):
            ji.less(base, maps())
    with pytest.raises(ValueError, match="has a low-rank state already"):
        ji.less(made, maps())
    with pytest.raises(ValueError, match="share one set of feature maps"):
        ji.per_layer([made, ji.less(ji.h2o(4, 3), maps(hidden=4))])
    with pytest.raises(ValueError, match="need a base policy given by name"):
        ji.less(ji.h2o(4, 3), maps(), heavy=3)
    other = jax.tree.map(lambda x: x[..., ::-1], LM.params)
    with pytest.raises(ValueError, match="belong to test.*other weights"):
        maps().check(LM.config, fingerprint(other))
    with pytest.raises(ValueError, match="num_heads 4, not 9|belong to"):
        lm_of("learned").generate([[1, 2]], policy=made, max_new_tokens=2)


def test_the_older_spelling_of_feature_maps_is_accepted():
    ours = maps()
    assert ji.less(ji.h2o(4, 3), kernels=ours).feature_maps is ours
    with pytest.raises(ValueError, match="both given"):
        ji.less(ji.h2o(4, 3), ours, kernels=ours)
