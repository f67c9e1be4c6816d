"""Attention in which each token uses some groups of heads (dejavu.md 2.8, 5.7 and 6)."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool

import jaxinfer as ji
from jaxinfer.cache import dense
from jaxinfer.cache.presets import full, kivi, streaming
from jaxinfer.inspection.decode_step import step_bytes
from jaxinfer.inspection.roofline import dots_only
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.params import init_params
from jaxinfer.models.quantize import quantize_params
from jaxinfer.models.stack import commit, forward, init_cache
from jaxinfer.nn.listed import InputMajor
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Router, Rule, Selector
from jaxinfer.sparsity.heads import SparseHeads, arranged
from jaxinfer.speculative.topology import Topology
from jaxinfer.testing.quick import quick_jit
from jaxinfer.typing import Leaf
from tests.factories import CONFIGS, params_of, random_tokens
from tests.sparsity.sparse_heads import (
    GROUPED,
    router,
    sparse_lm,
    with_random_heads,
    with_selector,
)

ABOVE = Rule(threshold=0.0)  # about half of the groups, other ones for every token
MODELS = pytest.mark.parametrize(
    "model", ["llama", "learned", pytest.param("sliding", marks=pytest.mark.slow)]
)


@pytest.fixture
def lists_small_groups(monkeypatch):
    monkeypatch.setattr("jaxinfer.sparsity.heads.SMALLEST_GROUP", 1)


@quick_jit
def plain(cfg, params, tokens):
    return forward(cfg, params, tokens).logits


@quick_jit
def one_step(cfg, params, cache, token):
    out = forward(cfg, params, token, cache)
    one = jnp.ones((len(token),), jnp.int32)
    return commit(cfg, params, cache, out.fresh, None, one, out.hidden), out.logits


def decoded(cfg, params, policy, tokens, backend=None):
    """Logits of tokens that are read one by one."""
    cache = init_cache(cfg, params, policy, len(tokens), 128, backend=backend)
    found = []
    for place in range(tokens.shape[1]):
        cache, logits = one_step(cfg, params, cache, tokens[:, place : place + 1])
        found.append(logits)
    return np.concatenate(found, axis=1)


def assert_near(found, wanted):
    """Equal within 1e-5 of the largest number, for each of two layers."""
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


@MODELS
def test_with_all_heads_it_is_the_dense_model(model):
    tokens, cfg = jnp.asarray(random_tokens(2, 12)), CONFIGS[model]
    wanted = plain(cfg, params_of(model), tokens)
    params = with_random_heads(cfg, params_of(model), Rule(most=cfg.num_kv_heads), keys="deferred")
    assert_near(plain(cfg, params, tokens), wanted)
    assert_near(decoded(cfg, params, full(), tokens), wanted)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Given(Selector):
    """What each row uses is given."""

    mask: Leaf  # bool[R, K]

    @property
    def units(self) -> int:
        return self.mask.shape[1]

    def __call__(self, sites) -> Bool[Array, "R K"]:
        return self.mask


@MODELS
def test_unselected_groups_add_nothing_to_a_token(model, monkeypatch):
    """dejavu.md 6.2: random heads equal the simulation, which is a dense model with an output
    projection per token that has zeros for what the token did not select."""
    cfg, dense, tokens = CONFIGS[model], params_of(model), jnp.asarray(random_tokens(2, 12))
    masks = np.random.default_rng(3).random((cfg.num_layers, 24, cfg.num_kv_heads)) < 0.4
    masks[:, 0] = False
    layers = tuple(
        with_selector(cfg, {"layers": (layer,)}, Given(mask=jnp.asarray(mask)))["layers"][0]
        for layer, mask in zip(dense["layers"], masks, strict=True)
    )
    found = plain(cfg, dense | {"layers": layers}, tokens)
    calls = iter(masks)

    def simulated(params, y, backend, heads):
        batch, heads, size, width = y.shape
        keep = np.repeat(next(calls), heads // cfg.num_kv_heads * width, axis=1)
        own = params["out"]["weight"][None] * keep[:, None]  # [B * T, D, N * H]
        rows = y.transpose(0, 2, 1, 3).reshape(batch * size, heads * width)
        added = jnp.einsum("rdi,ri->rd", own, rows).reshape(batch, size, -1)
        return added + params["out"].get("bias", 0)

    monkeypatch.setattr("jaxinfer.models.attention.output", simulated)
    wanted = forward(cfg, dense, tokens).logits
    assert_near(found, wanted)


@pytest.mark.parametrize(
    "policy, keys",
    [
        (full(), "always"),
        (streaming(4, 20), "deferred"),
        pytest.param(kivi(bits=4, group=8), "deferred", marks=pytest.mark.slow),
    ],
)
def test_decoding_equals_the_forward_pass_of_the_whole_text(policy, keys):
    """dejavu.md 6.2: prefill, decode and the masked form agree; what a policy loses aside."""
    cfg, tokens = GROUPED, jnp.asarray(random_tokens(2, 20))
    params = with_random_heads(cfg, dense_grouped(), ABOVE, keys=keys)
    wanted = plain(cfg, params, tokens)
    found = decoded(cfg, params, policy, tokens)
    assert_near(found, wanted)


def dense_grouped():
    return jax.tree.map(
        lambda x: 2 * x if x.ndim == 2 else x, init_params(GROUPED, jax.random.key(3))
    )


@pytest.mark.parametrize(
    "model, keys",
    [("learned", "deferred"), pytest.param("llama", "always", marks=pytest.mark.slow)],
)
def test_listed_groups_give_what_masked_ones_do(model, keys, lists_small_groups):
    """dejavu.md 6.2 for heads; biases, that of the output projection too, are added once."""
    cfg, tokens, rng = CONFIGS[model], jnp.asarray(random_tokens(3, 40)), np.random.default_rng(7)
    assert ("bias" in params_of(model)["layers"][0]["attn"]["q"]) == (model == "learned")
    dense = jax.tree.map(  # biases that are not zero
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) if x.ndim == 1 else x,
        params_of(model),
    )
    found = {}
    for name, unions in (("listed", (0.1,) * 3), ("masked", (1.0,) * 3)):
        params = with_random_heads(cfg, dense, ABOVE, keys=keys, unions=unions)
        heads = params["layers"][0]["attn"]["heads"]
        assert heads.lists(3, Backend.of("reference")) == (name == "listed")
        found[name] = decoded(cfg, params, full(), tokens)
    assert_near(found["listed"], found["masked"])


def test_the_kernel_interpreted_gives_what_masks_give():
    """Queries, outputs and a full cache: of unselected heads the kernels read nothing."""
    cfg, tokens, found = GROUPED, jnp.asarray(random_tokens(1, 17)), {}
    cfg, dense = replace(cfg, num_layers=1), dense_grouped()
    dense = dense | {"layers": dense["layers"][:1]}
    for kind, unions in (("reference", (1.0,)), ("interpret", (0.1,))):
        backend, options = Backend.of(kind), {"keys": "deferred", "unions": unions}
        params = with_random_heads(cfg, dense, ABOVE, backend=backend, **options)
        assert params["layers"][0]["attn"]["heads"].lists(1, backend) == (kind == "interpret")
        found[kind] = decoded(cfg, params, full(), tokens, backend)
    assert_near(found["interpret"], found["reference"])


def test_a_full_cache_is_read_by_the_kernel(monkeypatch):
    calls, real = [], dense.attend_heads
    monkeypatch.setattr(
        dense, "attend_heads", lambda *args, **options: calls.append(1) or real(*args, **options)
    )
    params = with_random_heads(GROUPED, dense_grouped(), ABOVE)
    for policy, expected in ((full(), 2), (streaming(4, 20), 0), (kivi(bits=4, group=8), 0)):
        calls.clear()
        cache = init_cache(GROUPED, params, policy, 1, 128, backend=Backend.of("interpret"))
        jax.eval_shape(lambda: forward(GROUPED, params, jnp.ones((1, 1), jnp.int32), cache).logits)  # noqa: B023
        assert len(calls) == expected, policy.name


def test_a_row_of_a_batch_is_the_row_alone(lists_small_groups):
    """dejavu.md 6.5."""
    cfg, tokens = CONFIGS["learned"], jnp.asarray(random_tokens(4, 20))
    options = {"keys": "deferred", "unions": (0.1,) * 3}
    params = with_random_heads(cfg, params_of("learned"), ABOVE, **options)
    together = decoded(cfg, params, full(), tokens)
    for row in range(4):
        alone = decoded(cfg, params, full(), tokens[row : row + 1])[0]
        assert_near(together[row], alone)


@pytest.mark.parametrize("lookahead", [0.5, pytest.param(None, marks=pytest.mark.slow)])
def test_a_selector_may_look_ahead(lookahead):
    """Heads are chosen by the input that `StepContext.sites` has for the look-ahead."""
    cfg, tokens, dense = CONFIGS["llama"], jnp.asarray(random_tokens(2, 12)), params_of("llama")
    first, last = dense["layers"]
    one = router(cfg, 5, ABOVE, lookahead=lookahead)
    layer = with_selector(cfg, {"layers": (last,)}, one)["layers"][0]
    params = dense | {"layers": (first, layer)}
    wanted = plain(cfg, params, tokens)
    found = decoded(cfg, params, full(), tokens)
    assert_near(found, wanted)
    here = with_selector(cfg, {"layers": (last,)}, router(cfg, 5, ABOVE))["layers"][0]
    other = plain(cfg, dense | {"layers": (first, here)}, tokens)
    assert not np.allclose(wanted, other, atol=1e-2)


@pytest.mark.parametrize("keys", ["deferred", pytest.param("always", marks=pytest.mark.slow)])
def test_greedy_speculation_keeps_the_sparse_models_text(keys):
    """Heads that change with every token are one trace besides (dejavu.md 6.6). The draft has
    sparse heads too, whose pending tokens wait for their keys."""
    lm = sparse_lm("llama", ABOVE, keys=keys)
    draft = sparse_lm("llama", Rule(most=1), keys=keys)
    prompts, options = [[3, 1, 4, 1], [5, 9]], {"max_new_tokens": 40, "ignore_eos": True}
    plain = lm.generate(prompts, **options)
    assert lm.engine.programs["decode"].traces == 1
    tree = Topology.from_children([[[], []], []])
    ahead = ji.speculate(lm, draft, tree).generate(prompts, **options)
    assert [one.tokens for one in ahead] == [one.tokens for one in plain]
    assert draft.generate(prompts, **options)[0].tokens != plain[0].tokens  # it does select


def test_other_weights_and_identity_tolerate_heads():
    cfg, dense = CONFIGS["llama"], params_of("llama")
    params = with_random_heads(cfg, dense, Rule(most=1))
    assert fingerprint(params) == fingerprint(dense)
    small = quantize_params(cfg, params, "int8")
    assert small["layers"][0]["attn"]["heads"].selector.units == cfg.num_kv_heads
    logits = plain(cfg, small, jnp.asarray([[3, 1, 4]]))
    assert np.isfinite(logits).all()
    assert dots_only(cfg, params, repeats=1) > 0


@pytest.mark.parametrize("keys", ["always", "deferred"])
@pytest.mark.parametrize("kind", ["reference", "interpret"])
def test_bytes_are_those_of_the_weights_that_a_step_reads(kind, keys, lists_small_groups):
    """dejavu.md 6.10, by hand: 8 query and 4 key heads of 8 numbers, width 32, float32."""
    backend, wide, narrow, one = Backend.of(kind), 4 * 64 * 32, 4 * 32 * 32, Rule(most=1)
    params = with_random_heads(GROUPED, dense_grouped(), one, keys=keys, backend=backend)
    attention = params["layers"][0]["attn"]
    heads, selector = attention["heads"], 4 * 4 * 32
    known = 1.0 if keys == "always" else 0.25 + 1 / 16
    expected = selector + 2 * 0.25 * wide + 2 * known * narrow
    assert heads.read_bytes(attention, 1, backend) == expected
    known = 1.0 if keys == "always" else 1 + 1 / 16
    expected = selector + 2 * wide + 2 * known * narrow  # 8 tokens use 0.9 of the groups
    assert heads.read_bytes(attention, 8, backend) == expected
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(attention))
    left = whole - heads.read_bytes(attention, 1, backend)
    wanted = step_bytes(GROUPED, dense_grouped()) + 2 * (selector - left)
    assert step_bytes(GROUPED, params, 0, 1, backend) == wanted
    assert heads.cache_share(full(), backend) == (0.25 if kind == "interpret" else 1.0)
    assert heads.cache_share(streaming(4, 20), backend) == 1.0


def test_parameters_are_arranged_for_the_machine_that_reads_them():
    params = with_random_heads(GROUPED, dense_grouped(), ABOVE)
    assert isinstance(params["layers"][0]["attn"]["out"]["weight"], InputMajor)
    on_gpu = arranged(params, Backend.of("interpret"))
    for layer, plain in zip(on_gpu["layers"], dense_grouped()["layers"], strict=True):
        rest = {name: part for name, part in layer["attn"].items() if name != "heads"}
        jax.tree.map(np.testing.assert_array_equal, rest, plain["attn"])
    back = arranged(on_gpu, Backend())
    jax.tree.map(np.testing.assert_array_equal, back, params)
    unselected = dense_grouped()
    assert arranged(unselected) is unselected


def test_impossible_heads_are_refused_in_one_line():
    cfg = CONFIGS["llama"]  # 4 query heads, 2 key/value heads
    one = Rule(most=1)
    with pytest.raises(ValueError, match="2 in this model of 4 query heads; the selector has 4"):
        SparseHeads.of(cfg, Router(outer=jnp.zeros((4, cfg.hidden_size)), rule=one))
    with pytest.raises(ValueError, match="the selector reads a width of 5, the layer 32"):
        SparseHeads.of(cfg, Router(outer=jnp.zeros((2, 5)), rule=one))
    with pytest.raises(ValueError, match="keys must be one of 'always', 'deferred'; got 'later'"):
        SparseHeads.of(cfg, router(cfg, 0, one), keys="later")
