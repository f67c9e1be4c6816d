"""A walk through a model: its states and attention are those of others who run the same model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.models.quantize import quantize_weights
from jaxinfer.models.registry import config_from_hf
from jaxinfer.models.stack import unembed
from jaxinfer.models.walk import reread, walk
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import linear
from jaxinfer.nn.norm import norm
from jaxinfer.runtime.backend import Backend
from tests.factories import CONFIGS, lm_of, params_of, random_tokens
from tests.models import hyena_models
from tests.policies import over, with_random_feature_maps

SIZE = 39
TOKENS = random_tokens(2, SIZE)


def logits_of(lm, states):
    """What the model makes of the states behind its last layer."""
    hidden = norm(
        lm.params["final_norm"], jnp.asarray(states), kind=lm.config.norm, eps=lm.config.norm_eps
    )
    return np.asarray(unembed(lm.config, lm.params, hidden))


def attention(view, text=0, block=256):
    return np.concatenate(list(view.attention(text, block)))


# Grouped queries and rotary positions, a window in one layer, ALiBi, learned positions, a parallel
# block that rotates a part of each head.
@pytest.mark.parametrize(
    "name",
    ["llama, grouped queries", "qwen2, sliding from layer 1", "mpt", "opt", "falcon 7b"],
)  # fmt: skip
def test_attention_and_states_are_those_of_hugging_face(name):
    torch = pytest.importorskip("torch")
    from tests.models import test_hf_parity as hf

    model, config = hf.reference(name)
    cfg = config_from_hf(config)
    tokens = hf.random_tokens(cfg.vocab_size)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens), output_attentions=True, output_hidden_states=True)
    lm = LM(cfg, hf.params_of(cfg, hf.tensors_of(model)))
    for view in walk(lm, tokens):
        theirs = found.attentions[view.index].numpy()  # [Q, N, T, T]
        for text in (0, 1):
            ours = attention(view, text, block=8).swapaxes(0, 1)
            np.testing.assert_allclose(ours, theirs[text], atol=2e-5)
        scale = np.abs(found.hidden_states[view.index].numpy()).max()
        states = found.hidden_states[view.index].numpy()
        np.testing.assert_allclose(view.before, states, atol=1e-5 * scale)


@pytest.mark.parametrize("model", ["llama", "parallel"])
def test_a_walk_ends_where_the_model_does_and_its_parts_add_up(model):
    lm = lm_of(model)
    views = list(walk(lm, TOKENS))
    np.testing.assert_allclose(logits_of(lm, views[-1].after), lm.logits(TOKENS), atol=1e-4)
    np.testing.assert_array_equal(views[1].before, views[0].after)
    for view in views:
        block = view.params["mlp"]
        fed = linear(block["down"], jnp.asarray(view.hidden))
        np.testing.assert_allclose(view.before + view.mixed + fed, view.after, atol=1e-4)
        up = linear(block["up"], jnp.asarray(view.mlp_input))
        if view.gate is None:
            up, gate = activate(lm.config.activation, up), 1
        else:
            gate = view.gate
        np.testing.assert_allclose(gate * up, view.hidden, atol=1e-4)


POLICIES = {
    "kivi": ji.kivi(bits=4, group=8, residual=8),
    "kivi, rotated": ji.kivi(bits=4, group=8, residual=8, rotation="hadamard"),
    "streaming": ji.streaming(2, 6),
    "streaming, in the text": ji.streaming(2, 6, positions="absolute"),
    "h2o": ji.h2o(3, 4),
    "per layer": ji.per_layer(["full", ji.h2o(0.2, 0.2)]),
}


def through(lm, policy):
    """log p of each token but the first, from the states that the walk ends with."""
    *_, last = walk(lm, TOKENS[:1], policy)
    log_probs = jax.nn.log_softmax(logits_of(lm, last.after)[0, :-1])
    return np.take_along_axis(np.asarray(log_probs), TOKENS[0, 1:, None], axis=1)[:, 0]


@pytest.mark.parametrize("name", POLICIES)
def test_layers_read_through_their_caches_as_scoring_does(name):
    lm = lm_of("llama")
    expected = lm.score([TOKENS[0].tolist()], policy=POLICIES[name])[0].log_probs
    np.testing.assert_allclose(through(lm, POLICIES[name]), expected, atol=1e-4)


def test_layers_of_modes_and_of_stored_inputs_read_through_their_states():
    lm = hyena_models.lm_of("multi")
    expected = lm.score([TOKENS[0].tolist()], policy=POLICIES["h2o"])[0].log_probs
    np.testing.assert_allclose(through(lm, POLICIES["h2o"]), expected, atol=1e-4)


def test_weights_in_eight_bits_are_walked_as_they_are():
    cfg, params = CONFIGS["llama"], quantize_weights(params_of("llama"), "int8", Backend.of())
    lm = LM(cfg, params)
    *_, last = walk(lm, TOKENS)
    np.testing.assert_allclose(logits_of(lm, last.after), lm.logits(TOKENS), atol=1e-4)


@pytest.mark.parametrize("name", ["streaming", "h2o"])
def test_attention_by_the_kernels_is_that_of_their_references(name):
    """As a GPU runs it: another layout, and kernels, here interpreted."""
    small = TOKENS[:1, :14]
    kernels = LM(CONFIGS["llama"], params_of("llama"), implementation="interpret")
    pairs = zip(
        walk(kernels, small, POLICIES[name]), walk(lm_of("llama"), small, POLICIES[name]),
        strict=True,
    )  # fmt: skip
    for ours, theirs in pairs:
        np.testing.assert_allclose(attention(ours), attention(theirs), atol=1e-5)
        np.testing.assert_allclose(ours.after, theirs.after, atol=1e-4)


def test_evicted_tokens_live_on_in_feature_maps_as_scoring_has_them():
    lm = lm_of("llama")
    policy = with_random_feature_maps(over(ji.h2o(2, 3)), lm.config)
    bare = through(lm, ji.h2o(2, 3))
    expected = lm.score([TOKENS[0].tolist()], policy=policy)[0].log_probs
    found = through(lm, policy)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - bare).max() > 1e-3


def test_with_full_inputs_errors_do_not_add_up():
    lm, policy = lm_of("llama"), ji.streaming(1, 3)
    plain, own, full = (list(walk(lm, TOKENS, *how)) for how in ((), (policy,), (policy, "full")))
    for one, other in zip(plain, full, strict=True):
        np.testing.assert_array_equal(one.before, other.before)
        assert np.abs(one.after - other.after).max() > 1e-2
    np.testing.assert_array_equal(own[0].after, full[0].after)
    assert np.abs(own[1].before - plain[1].before).max() > 1e-2


@pytest.mark.parametrize(
    ("model", "name"),
    [("llama", "streaming"), ("llama", "h2o"), ("mpt", "h2o"), ("sliding", "streaming"),
     ("sliding", None)],
)  # fmt: skip
def test_attention_weighs_the_values_that_heads_give(model, name):
    policy = None if name is None else POLICIES[name]
    groups = CONFIGS[model].num_heads // CONFIGS[model].num_kv_heads
    for view in walk(lm_of(model), TOKENS[:1], policy):
        weights = attention(view, block=5)
        np.testing.assert_allclose(weights.sum(axis=2), 1, atol=1e-5)
        values = np.repeat(view.v[0], groups, axis=1)
        heads = np.einsum("tns,snh->tnh", weights, values)
        np.testing.assert_allclose(heads, view.heads[0], atol=1e-4)
        kept = {"streaming": 2 + 6 + 1, "h2o": 3 + 4 + 1, None: SIZE}[name]
        assert (weights > 0).sum(axis=2).max() <= kept
        assert model == "sliding" or (weights > 0).sum(axis=2).max() == kept


def test_attention_to_quantized_tokens_is_near_the_plain_one():
    for policy in ("kivi", "kivi, rotated"):
        for plain, packed in zip(
            walk(lm_of("llama"), TOKENS[:1]),
            walk(lm_of("llama"), TOKENS[:1], POLICIES[policy], "full"),
            strict=True,
        ):
            weights, expected = attention(packed), attention(plain)
            np.testing.assert_allclose(weights.sum(axis=2), 1, atol=1e-5)
            # Nothing is packed before the residual is full.
            np.testing.assert_allclose(weights[:7], expected[:7], atol=1e-5)
            assert np.abs(weights - expected).mean() < 0.01 < np.abs(weights - expected).max()


def test_sink_logits_take_their_share():
    cfg = replace(CONFIGS["llama"], sink_logits=True)
    params = init_params(cfg, jax.random.key(0))
    for layer in params["layers"]:
        layer["attn"]["sink"] = jnp.arange(4.0)
    view = next(walk(LM(cfg, params), TOKENS[:1]))
    weights = attention(view)
    heads = np.einsum("tns,snh->tnh", weights, np.repeat(view.v[0], 2, axis=1))
    np.testing.assert_allclose(heads, view.heads[0], atol=1e-5)
    assert (weights.sum(axis=2) < 1).all() and weights.sum(axis=2).min() < 0.1


def test_padding_changes_no_row_and_is_given_by_lengths():
    lm = lm_of("llama")
    padded = np.where(np.arange(SIZE) < 9, TOKENS, 5)
    for policy in (None, POLICIES["h2o"]):
        long, short = (
            list(walk(lm, tokens, policy, lengths=lengths))
            for tokens, lengths in ((padded, [9, 9]), (TOKENS[:, :9], None))
        )
        np.testing.assert_allclose(long[1].after[:, :9], short[1].after, atol=1e-5)
        assert len(attention(long[1])) == 9


def test_a_layer_without_attention_has_states_and_says_what_it_lacks():
    lm = hyena_models.lm_of("multi")
    views = list(walk(lm, TOKENS % lm.config.vocab_size))
    expected = lm.logits(TOKENS % lm.config.vocab_size)
    np.testing.assert_allclose(logits_of(lm, views[-1].after), expected, atol=1e-4)
    for policy in (None, "full"):
        views = list(walk(lm, TOKENS % lm.config.vocab_size, policy))
        without = [view for view in views if view.q is None]
        assert 0 < len(without) < len(views)
        with pytest.raises(ValueError, match="has a hyena mixer, which gives no probabilities"):
            next(without[0].attention())


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[1, 2], [3]], {}, "expected texts of equally many tokens"),
        (np.array([[]], np.int32), {}, "at least one"),
        ([[]], {}, "at least one"),
        ([[1, 61]], {}, "not all in the vocabulary of 61"),
        ([[1, 2]], {"policy": "kivi3"}, "kivi3"),
        ([[1, 2]], {"policy": "full", "chunk": 0}, "chunk must be a whole number"),
        ([[1, 2]], {"lengths": [3]}, "expected 1 lengths from 1 to 2"),
    ],
)
def test_what_cannot_be_walked_is_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        next(walk(lm_of("llama"), tokens, **options))


def test_policies_that_do_not_suit_the_model_are_refused():
    with pytest.raises(ValueError, match="learned positions"):
        next(walk(lm_of("learned"), TOKENS, "streaming"))
    with pytest.raises(ValueError, match="exceed the 64 learned positions"):
        next(walk(lm_of("learned"), random_tokens(1, 65)))
    assert params_of("learned")  # the model itself is sound


@pytest.mark.parametrize("name", [*POLICIES, "full", "mpt"])
def test_what_a_cache_holds_is_read_back_by_position(name):
    lm = lm_of("mpt" if name == "mpt" else "llama")
    policy = POLICIES.get(name, "full")
    for view in walk(lm, TOKENS[:1]):
        again = reread(lm, view, policy)
        found = again.stored()
        for stored, given in ((found.k, view.k), (found.v, view.v)):
            given = given[0].swapaxes(0, 1)
            held = np.where(found.kept[..., None], given, 0)
            if "kivi" in name:
                assert 0 < np.abs(stored - held).max() < 0.5 and found.kept.all()
                # The last block is not quantized yet, and neither are the last 8 values.
                np.testing.assert_allclose(stored[:, 32:], held[:, 32:], atol=1e-5)
            else:
                np.testing.assert_allclose(stored, held, atol=1e-5)
        if name == "kivi":  # half a step of 4 bits, of groups of 8 channels
            groups = view.v[0].swapaxes(0, 1)[:, :31].reshape(2, 31, -1, 8)
            step = np.ptp(groups, axis=3, keepdims=True) / 15
            error = np.abs(found.v[:, :31].reshape(groups.shape) - groups) / step
            assert 0.4 < error.max() < 0.51
        share = {"full": SIZE, "kivi": SIZE, "kivi, rotated": SIZE, "h2o": 7, "mpt": SIZE}
        share |= {"per layer": (SIZE, 14)[view.index]}
        assert (found.kept.sum(axis=1) == share.get(name, 8)).all()
        if name.startswith("streaming"):
            assert found.kept[:, [0, 1, *range(33, 39)]].all()


def test_a_layer_is_read_again_as_a_walk_with_full_inputs_reads_it():
    lm, policy = lm_of("llama"), POLICIES["h2o"]
    for plain, view in zip(walk(lm, TOKENS), walk(lm, TOKENS, policy, "full"), strict=True):
        again = reread(lm, plain, policy)
        np.testing.assert_array_equal(again.after, view.after)
        np.testing.assert_array_equal(again.before, plain.before)
        np.testing.assert_array_equal(again.stored(1).kept, view.stored(1).kept)
