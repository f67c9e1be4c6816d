"""Activations of frozen models: a walk is the model's own forward pass, whatever the family."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.layer_reader import LayerReader, valid_lengths
from jaxinfer.models.stack import forward
from jaxinfer.nn.linear import linear
from jaxinfer.nn.mlp import FeedForward, feed_forward
from jaxinfer.nn.norm import norm
from tests.factories import CONFIGS, MODELS, params_of, random_tokens

CONTEXT, LENGTHS = 12, [12, 5]
EVERY = pytest.mark.parametrize("model", MODELS)


def everything(index, layer, view):
    return {name: x for name, x in vars(view).items() if name != "after" and x is not None}


def walked(model: str):
    """What a walk sees of each layer, the states in front of each and behind all, the tokens."""
    cfg, params, tokens = CONFIGS[model], params_of(model), random_tokens(2, CONTEXT)
    walk = LayerReader(cfg, CONTEXT, everything)
    hidden = walk.embed(params, tokens)
    seen, states = [], [hidden.copy()]
    for index, layer in enumerate(params["layers"]):
        seen.append(walk.read(index, layer, hidden, LENGTHS))
        states.append(hidden.copy())
    return cfg, params, tokens, seen, states


def rows(x):
    """The valid rows of [Q, T, ...]."""
    return np.concatenate([np.asarray(one[:n]) for one, n in zip(x, LENGTHS, strict=True)])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorder(FeedForward):
    """A dense block that keeps the sites that a selector would be given."""

    dense: dict
    kept: list = field(metadata={"static": True})

    def __call__(self, cfg, x, sites=(), backend=None):
        self.kept[:] = sites
        return feed_forward(cfg, self.dense, x, 0)


@EVERY
def test_a_walk_sees_what_selectors_are_given_and_ends_where_the_model_does(model):
    cfg, params, tokens, seen, states = walked(model)
    kept: list = []
    layers = tuple(one | {"mlp": Recorder(one["mlp"], kept)} for one in params["layers"])
    hidden = forward(cfg, params | {"layers": layers}, jnp.asarray(tokens), logits="none").hidden
    found = norm(params["final_norm"], jnp.asarray(states[-1]), kind=cfg.norm, eps=cfg.norm_eps)
    np.testing.assert_allclose(rows(found), rows(hidden), atol=1e-4)
    inputs = [one[name] for one in seen for name in ("attention_input", "mlp_input")]
    for ours, theirs in zip([rows(states[0]), *inputs], kept, strict=True):
        np.testing.assert_allclose(ours, rows(theirs), atol=1e-4)


@EVERY
def test_heads_and_neurons_add_up_to_what_the_layer_adds(model):
    cfg, params, _, seen, states = walked(model)
    for index, (layer, one) in enumerate(zip(params["layers"], seen, strict=True)):
        assert one["heads"].shape[1:] == (cfg.num_heads, cfg.head_dim)
        mixed = linear(layer["attn"]["out"], jnp.asarray(one["heads"].reshape(sum(LENGTHS), -1)))
        np.testing.assert_allclose(mixed, one["mixed"], atol=1e-4)
        fed = linear(layer["mlp"]["down"], jnp.asarray(one["hidden"]))
        added = rows(states[index + 1]) - rows(states[index])
        np.testing.assert_allclose(mixed + fed, added, atol=1e-4)


def test_padding_is_in_no_row_and_changes_none():
    """dejavu.md trap 3.5: as many rows as the texts have tokens, and no tail of zeros."""
    cfg, params = CONFIGS["mpt"], params_of("mpt")
    tokens = random_tokens(2, CONTEXT)
    walk = LayerReader(cfg, CONTEXT, everything)
    found = []
    for filler in (0, 7):
        given = np.where(np.arange(CONTEXT) < np.array(LENGTHS)[:, None], tokens, filler)
        found.append(walk.read(0, params["layers"][0], walk.embed(params, given), LENGTHS))
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        assert len(one) == sum(LENGTHS) and (np.abs(one).reshape(len(one), -1).max(1) > 0).all()
        np.testing.assert_array_equal(one, other)


def test_layers_of_a_kind_share_a_program():
    walk = LayerReader(CONFIGS["llama"], CONTEXT, everything)
    hidden = walk.embed(params_of("llama"), random_tokens(1, CONTEXT))
    for index, layer in enumerate(params_of("llama")["layers"]):
        walk.read(index, layer, hidden, [CONTEXT])
    assert walk.programs == 1


def test_what_cannot_be_walked_is_refused():
    params = params_of("llama")
    walk = LayerReader(CONFIGS["llama"], CONTEXT, everything)
    hidden = walk.embed(params, random_tokens(1, CONTEXT))
    layer = params["layers"][0]
    with pytest.raises(ValueError, match="layer 0 is no dense one"):
        walk.read(0, layer | {"mlp": Recorder(layer["mlp"], [])}, hidden, [CONTEXT])
    huge = jax.tree.map(lambda x: x * 1e30, layer["mlp"])
    with pytest.raises(ValueError, match="layer 0 gives numbers that are not finite"):
        walk.read(0, layer | {"mlp": huge}, hidden, [CONTEXT])
    with pytest.raises(ValueError, match="exceed the 64 learned positions"):
        LayerReader(CONFIGS["learned"], 65, everything)
    for lengths in ([3], [3, 13], [3, 0]):
        with pytest.raises(ValueError, match="expected 2 lengths from 1 to 12"):
            valid_lengths(random_tokens(2, CONTEXT), lengths)
