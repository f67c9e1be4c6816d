"""Weights of 8 and 4 bits: their products, what they cost, and models that decode with them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import bytes_of
from jaxinfer.inspection.decode_step import inspect_decode
from jaxinfer.lm import LM
from jaxinfer.models.calibrate import calibration_tokens, smoothing
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.mixers import _MIXERS
from jaxinfer.models.params import init_params
from jaxinfer.models.quantize import quantize_params, quantize_weights
from jaxinfer.models.stack import forward
from jaxinfer.nn.linear import linear, product, rows
from jaxinfer.nn.quantized import Int8Weight, PackedWeight, rounded_to_int8, size_of
from jaxinfer.runtime.backend import Backend
from tests.factories import CONFIGS, MODELS, lm_of, random_tokens
from tests.models.recurrent_mixer import RunningMean

NEW = {"max_new_tokens": 10, "ignore_eos": True}
PROMPTS = [[3, 1, 4, 1], [5, 9]]
INPUTS, OUTPUTS = 48, 80


def quantized(name: str, weights="int8", implementation=None) -> LM:
    lm, backend = lm_of(name), Backend.of(implementation)
    params = quantize_params(lm.config, lm.params, weights, backend=backend)
    return LM(lm.config, params, name=name, implementation=implementation)


def int8_weight(seed: int = 0) -> tuple[jax.Array, Int8Weight]:
    keys = jax.random.split(jax.random.key(seed))
    weight = jax.random.normal(keys[0], (OUTPUTS, INPUTS))
    smooth = jnp.exp(jax.random.normal(keys[1], (INPUTS,)))
    codes, scale = rounded_to_int8(weight * smooth)
    stored = Int8Weight(codes=codes, scale=scale, smooth=smooth, dtype="float32", origin="")
    return weight, stored


@pytest.mark.parametrize("count", [1, 2, 5, 64, 65])
def test_an_int8_product_is_an_exact_sum_of_integers(count):
    weight, stored = int8_weight()
    x = np.asarray(jax.random.normal(jax.random.key(3), (count, INPUTS)))
    found = jax.jit(product)(jnp.asarray(x), stored)
    smoothed = x / np.asarray(stored.smooth)
    scale = np.abs(smoothed).max(axis=1) * np.float32(1 / 127)
    codes = np.rint(smoothed / scale[:, None]).astype(np.int64)
    sums = codes @ np.asarray(stored.codes, np.int64).T
    np.testing.assert_allclose(found, sums * scale[:, None] * np.asarray(stored.scale), rtol=1e-5)
    # each of the two factors is off by at most half a step of its own
    exact = x.astype(np.float64) @ np.asarray(weight, np.float64).T
    whole = np.abs(np.asarray(weight * stored.smooth)).sum(axis=1)
    bound = scale[:, None] / 2 * whole + np.abs(smoothed).sum(axis=1)[:, None] * np.asarray(
        stored.scale
    )
    assert (np.abs(found - exact) <= bound).all()


def test_a_row_has_the_same_product_alone_as_among_others():
    _, stored = int8_weight()
    x = jax.random.normal(jax.random.key(1), (9, INPUTS))
    together = jax.jit(product)(x, stored)
    alone = jnp.concatenate([jax.jit(product)(row[None], stored) for row in x])
    assert np.array_equal(together, alone)
    assert np.array_equal(together, product(x.reshape(3, 3, INPUTS), stored).reshape(9, OUTPUTS))


def test_rows_and_biases_of_a_stored_weight():
    weight, stored = int8_weight()
    found = rows(stored, jnp.asarray([[3, 70], [3, 0]]))
    step = np.asarray(stored.scale)[:, None] / np.asarray(stored.smooth) / 2
    assert found.shape == (2, 2, INPUTS)
    assert (np.abs(found[0, 1] - weight[70]) <= step[70] * 1.001).all()
    x = jnp.ones((2, INPUTS))
    biased = linear({"weight": stored, "bias": jnp.ones(OUTPUTS)}, x)
    np.testing.assert_allclose(biased, product(x, stored) + 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights, bits", [("int8", 8), ("int4", 4)])
def test_the_head_has_8_bits_in_every_format(weights, bits, tied):
    """A tied one is the embedding; an embedding that is no head stays as it is."""
    lm = lm_of("llama")
    head = lm.params["embed"]["tokens"]
    params = {"embed": {"tokens": head}, "layers": lm.params["layers"]}
    params |= {} if tied else {"head": {"weight": head}}
    stored = quantize_weights(params, weights, Backend.of("triton"))
    found = stored["embed"]["tokens"] if tied else stored["head"]["weight"]
    assert isinstance(found, PackedWeight) and found.packed.bits == 8
    assert stored["layers"][0]["attn"]["q"]["weight"].packed.bits == bits
    assert tied or stored["embed"]["tokens"] is head


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_stays_close_to_itself(name, weights):
    lm, small = lm_of(name), quantized(name, weights)
    tokens = random_tokens(2, 24)
    exact, found = (np.asarray(x.logits(tokens)).ravel() for x in (lm, small))
    assert np.corrcoef(exact, found)[0, 1] > {"int8": 0.998, "int4": 0.85}[weights]


@pytest.mark.parametrize("name", ["llama", "learned"])
def test_reading_in_chunks_changes_nothing(name):
    small = quantized(name)
    tokens = random_tokens(1, 40)[0]
    (whole,), (single,), (chunked,) = (small.score([tokens], chunk=c) for c in (64, 1, 7))
    np.testing.assert_allclose(single.log_probs, whole.log_probs, atol=2e-2)
    np.testing.assert_allclose(chunked.log_probs, whole.log_probs, atol=2e-2)


@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_speculation_gives_the_tokens_of_plain_decoding(policy):
    small = quantized("llama")
    plan = ji.speculate(small, ji.early_exit(small, 1), ji.Topology.from_children([[[]], []]))
    plain = small.generate(PROMPTS, policy=policy, **NEW)
    guessed = small.generate(PROMPTS, policy=policy, draft=plan, **NEW)
    assert [out.tokens for out in guessed] == [out.tokens for out in plain]


def test_the_packed_form_gives_the_same_text_through_its_kernel():
    plain = quantized("llama", "int4", implementation="reference")
    kernel = quantized("llama", "int4", implementation="interpret")
    assert isinstance(kernel.params["layers"][0]["attn"]["q"]["weight"], PackedWeight)
    tokens = random_tokens(1, 5)[0]
    (found,), (wanted,) = (lm.score([tokens]) for lm in (kernel, plain))
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-3)


def test_many_rows_are_multiplied_with_the_weight_in_full():
    stored = quantized("llama", "int4").params["layers"][0]["mlp"]["up"]["weight"]
    x = jax.random.normal(jax.random.key(0), (70, 32))
    np.testing.assert_allclose(product(x, stored)[:64], product(x[:64], stored), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "learned"])
def test_sizes_count_what_is_stored(name):
    lm, small = lm_of(name), quantized(name)
    assert size_of(small.params) == size_of(lm.params)
    matrices = [x for x in jax.tree.leaves(lm.params["layers"]) if x.ndim == 2]
    expected = sum(x.size + 4 * len(x) for x in matrices)
    for layer in lm.params["layers"]:  # the factors that no norm could take
        expected += 4 * (layer["attn"]["out"]["weight"].shape[1] + CONFIGS[name].intermediate_size)
        expected += 4 * 2 * CONFIGS[name].hidden_size  # and those that two norms took
    vectors = sum(x.nbytes for x in jax.tree.leaves(lm.params["layers"]) if x.ndim != 2)
    assert bytes_of(small.params["layers"]) == expected + vectors
    tied = lm.config.tie_embeddings
    head = small.params["embed"]["tokens"] if tied else small.params["head"]["weight"]
    assert isinstance(head, Int8Weight)
    assert isinstance(small.params["embed"]["tokens"], Int8Weight) == tied


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_decode_step_compiles_once_and_copies_no_cache(weights):
    lm = quantized("llama", weights)
    facts = inspect_decode(lm.config, lm.params, ji.full(), capacity=1024, batch=2)["decode"]
    assert (facts["traces"], facts["cache_copies"], facts["unaliased_leaves"]) == (1, 0, 0)


def test_an_int8_step_makes_no_copy_of_a_weight():
    _, stored = int8_weight()
    compiled = jax.jit(product).lower(jnp.ones((4, INPUTS)), stored).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < OUTPUTS * INPUTS


def test_smoothing_protects_small_channels_from_large_ones():
    lm = lm_of("llama")
    layers = []
    for layer in lm.params["layers"]:  # one input of 100, which weights of 1/100 take back
        new = jax.tree.map(lambda x: x, layer)
        for part, names in (("attn", ("q", "k", "v")), ("mlp", ("gate", "up"))):
            scale = new[f"{part}_norm"]["scale"]
            new[f"{part}_norm"]["scale"] = scale.at[5].set(100.0)
            for name in names:
                weight = new[part][name]["weight"]
                new[part][name]["weight"] = weight.at[:, 5].multiply(0.01)
        layers.append(new)
    params = lm.params | {"layers": tuple(layers)}
    tokens = random_tokens(1, 24)
    exact = LM(lm.config, params).logits(tokens)
    smooth, flat = quantize_params(lm.config, params, "int8"), quantize_weights(params, "int8")
    errors = [
        float(jnp.abs(LM(lm.config, p).logits(tokens) - exact).mean()) for p in (smooth, flat)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_factors_follow_the_largest_input_that_was_seen():
    lm = lm_of("llama")
    tokens = calibration_tokens(lm.config, None)
    divided, factors = smoothing(lm.config, lm.params, tokens)
    assert len(factors.divided) == 5 * lm.config.num_layers
    assert len(factors.own) == 2 * lm.config.num_layers + 1
    x = lm.params["embed"]["tokens"][tokens]
    scale = np.asarray(lm.params["layers"][0]["attn_norm"]["scale"])
    normed = x / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + lm.config.norm_eps) * scale
    attn = lm.params["layers"][0]["attn"]
    weight = np.max([np.abs(attn[part]["weight"]).max(axis=0) for part in "qkv"], axis=0)
    expected = np.abs(normed).max(axis=0) ** 0.4 / weight**0.6
    for part in "qkv":  # they read the same activation, which is rounded once
        name = f"['layers'][0]['attn']['{part}']['weight']"
        np.testing.assert_allclose(factors.divided[name], expected, rtol=1e-4)
    new = divided["layers"][0]["attn_norm"]["scale"]
    np.testing.assert_allclose(new * expected, scale, rtol=1e-4)


def test_stored_weights_keep_the_identity_of_the_model():
    for weights in ("int8", "int4"):
        assert fingerprint(quantized("llama", weights).params) == fingerprint(lm_of().params)
    assert fingerprint(lm_of(seed=1).params) != fingerprint(lm_of().params)


def test_a_session_of_a_quantized_model_is_restored(tmp_path):
    small = quantized("llama")
    session = small.session()
    session.append(PROMPTS[0])
    session.save(tmp_path / "s")
    tokens = session.generate(**NEW).tokens
    assert small.restore(tmp_path / "s").generate(**NEW).tokens == tokens
    with pytest.raises(ValueError, match="model"):
        lm_of().restore(tmp_path / "s")


def test_load_takes_the_format_of_the_weights():
    lm = ji.load("tiny-llama", weights="int8")
    plain = ji.load("tiny-llama", dtype="float32")
    assert bytes_of(lm.params) < 0.27 * bytes_of(plain.params)
    text = "It was a bright cold day in April, and the clocks were striking thirteen. "
    exact, found = (x.score([text])[0].nll for x in (plain, lm))
    assert abs(exact - found) < 0.03


def test_impossible_formats_are_refused():
    lm = lm_of()
    with pytest.raises(ValueError, match="weights must be 'int8' or 'int4', or None, got 'int3'"):
        quantize_params(lm.config, lm.params, "int3")
    odd = jax.tree.map(lambda x: x[:, :24] if x.ndim == 2 else x, lm.params)
    with pytest.raises(ValueError, match=r"multiple of 16, params\['head'\].*has 24"):
        quantize_params(
            lm.config, {"embed": odd["embed"], "layers": (), "head": odd["head"]}, "int4"
        )
    assert CONFIGS["llama"].hidden_size % 16 == 0


@pytest.mark.parametrize("name", MODELS)
def test_dividing_norms_and_multiplying_weights_changes_no_logit(name):
    lm = lm_of(name)
    divided, factors = smoothing(lm.config, lm.params, calibration_tokens(lm.config, None))

    def restored(path, leaf):
        where = jax.tree_util.keystr(path)
        return leaf * factors.divided.get(where, 1.0)

    params = jax.tree_util.tree_map_with_path(restored, divided)
    tokens = random_tokens(1, 20)
    np.testing.assert_allclose(LM(lm.config, params).logits(tokens), lm.logits(tokens), atol=1e-4)


def test_a_mixer_that_is_not_known_keeps_its_norm_and_its_factors(monkeypatch):
    """Only attention's readers of its norm are known; in a shared norm all must be."""
    monkeypatch.setattr("jaxinfer.models.mixers._MIXERS", {**_MIXERS, "mean": RunningMean()})
    tokens = jnp.asarray(random_tokens(2, 24))
    for name in ("llama", "parallel"):
        cfg = replace(CONFIGS[name], mixers=("mean", "attn"))
        params = init_params(cfg, jax.random.key(0))
        small = quantize_params(cfg, params, "int8")
        norm, weight = small["layers"][0]["attn_norm"], small["layers"][0]["mean"]["u"]["weight"]
        assert "divisor" not in norm and weight.smooth is not None
        assert "divisor" in small["layers"][1]["attn_norm"]
        run = jax.jit(functools.partial(forward, cfg))
        exact, found = (np.asarray(run(p, tokens).logits).ravel() for p in (params, small))
        assert np.corrcoef(exact, found)[0, 1] > 0.998
