"""Sparse blocks of 8 bits, and selectors behind norms that 8-bit weights have divided."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.inspection.decode_step import step_bytes
from jaxinfer.lm import LM
from jaxinfer.models.calibrate import calibration_tokens, smoothing
from jaxinfer.models.quantize import quantize_params, quantize_weights
from jaxinfer.models.stack import forward
from jaxinfer.nn.block_mlp import BlockWeights
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.nn.quantized import Int8Weight, PackedWeight, size_of
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.masked import LargestHidden, MaskedMlp
from jaxinfer.sparsity.mlp import SparseMlp
from tests.factories import CONFIGS, params_of, random_tokens
from tests.sparsity.blocks import SIZE, router, sparse, with_sparse_blocks
from tests.sparsity.sparse_heads import with_random_heads

CPU = Backend.of("reference")
NAMES = ["llama", "learned", "parallel"]  # gated, plain, plain behind a shared norm
TOKENS = random_tokens(2, 24)
NEW = {"max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(autouse=True)
def lists_small_blocks(monkeypatch):
    monkeypatch.setattr("jaxinfer.sparsity.mlp.SMALLEST_BLOCK", 1)


class Noted(Router):
    """A router that writes down its scores."""

    seen: list = []

    def scores(self, x):
        self.seen.append(super().scores(x))
        return self.seen[-1]


jax.tree_util.register_dataclass(
    Noted, data_fields=["outer", "inner", "bias"], meta_fields=["rule", "lookahead"]
)


def noted(params):
    """The parameters with routers that write down their scores."""

    def one(block):
        made = Noted(**{name: getattr(block.selector, name) for name in FIELDS})
        return replace(block, selector=made)

    layers = params["layers"]
    layers = tuple(
        x | {"mlp": one(x["mlp"])} if isinstance(x["mlp"], SparseMlp) else x for x in layers
    )
    return params | {"layers": layers}


FIELDS = ("outer", "inner", "bias", "rule", "lookahead")


@functools.partial(jax.jit, static_argnums=0)
def scores_and_logits(cfg, params):
    Noted.seen.clear()
    logits = forward(cfg, noted(params), jnp.asarray(TOKENS)).logits
    return jnp.stack(Noted.seen), logits


@functools.partial(jax.jit, static_argnums=0)
def logits_of(cfg, params):
    return forward(cfg, params, jnp.asarray(TOKENS)).logits


@functools.cache
def dense_of(name: str, weights: str | None = None):
    cfg, params = CONFIGS[name], uneven(CONFIGS[name], params_of(name))
    return params if weights is None else quantize_params(cfg, params, weights)


def uneven(cfg, params):
    """The same model with some channels of its norms a hundred times larger than others, which
    factors then make even: a reader that is not told is far off."""
    factors = jnp.where(jnp.arange(cfg.hidden_size) % 5 == 0, 30.0, 0.3)
    layers = []
    for layer in params["layers"]:
        new = jax.tree.map(lambda x: x, layer)
        for norm in ("attn_norm", "mlp_norm"):
            if norm in new:
                new[norm]["scale"] = new[norm]["scale"] * factors
        readers = [new["attn"][name] for name in "qkv"]
        readers += [new["mlp"][name] for name in ("up", "gate") if name in new["mlp"]]
        for part in readers:
            part["weight"] = part["weight"] / factors
        layers.append(new)
    return params | {"layers": tuple(layers)}


@pytest.mark.parametrize(
    "name, lookahead, sparse_first",
    [
        ("parallel", 0.0, True), ("parallel", 0.5, False), ("parallel", 1.0, False),
        ("learned", 0.0, False), ("llama", 0.5, False),
        ("llama", 1.0, True), ("llama", 1.0, False),
    ],
)  # fmt: skip
def test_a_router_sees_the_same_in_an_8_bit_model(name, lookahead, sparse_first):
    """Its scores are those in the float model up to rounding, whichever norm it reads, and so are
    the logits: whether the router came before the 8 bits or after."""
    cfg = CONFIGS[name]
    exact = with_sparse_blocks(cfg, dense_of(name), 0.5, lookahead, first=1)
    if sparse_first:
        small = quantize_params(cfg, exact, "int8")
    else:
        small = with_sparse_blocks(cfg, dense_of(name, "int8"), 0.5, lookahead, first=1)
    assert small["layers"][1]["mlp"].weights.is_int8
    assert "divisor" in small["layers"][0]["attn_norm"]
    (wanted, logits), (found, rounded) = (
        map(np.asarray, scores_and_logits(cfg, params)) for params in (exact, small)
    )
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.998
    assert np.corrcoef(logits.ravel(), rounded.ravel())[0, 1] > 0.99
    most = cfg.intermediate_size // SIZE // 2
    kept = [np.sort(np.argsort(-x, axis=-1)[..., :most], axis=-1) for x in (wanted, found)]
    shared = [
        len(np.intersect1d(*sets))
        for sets in zip(*(k.reshape(-1, most) for k in kept), strict=True)
    ]
    assert np.mean(shared) > 0.95 * most


@pytest.mark.parametrize("name", ["llama", "parallel"])
def test_with_all_blocks_it_is_the_dense_one_in_8_bits(name):
    """Up to the rounding of hidden values, which the sparse block leaves out: it is no worse."""
    cfg, dense = CONFIGS[name], dense_of(name)
    small = dense_of(name, "int8")
    blocks = quantize_params(cfg, with_sparse_blocks(cfg, dense, 1.0), "int8")
    for one, other in zip(small["layers"], blocks["layers"], strict=True):  # calibrated alike
        up, down = (np.asarray(one["mlp"][part]["weight"].codes, int) for part in ("up", "down"))
        assert np.abs(up - other["mlp"].weights.up).max() <= 1
        assert np.abs(down.T - other["mlp"].weights.down).max() <= 1
    exact = logits_of(cfg, dense)
    errors = [float(jnp.abs(logits_of(cfg, p) - exact).mean()) for p in (small, blocks)]
    assert errors[1] < 1.1 * errors[0]


def test_blocks_of_8_bits_reuse_codes_and_scales():
    cfg = CONFIGS["llama"]
    small = quantize_params(cfg, params_of("llama"), "int8")["layers"][0]["mlp"]
    weights = sparse(cfg, small, 0.5).weights
    assert (
        weights.up is small["up"]["weight"].codes
        and weights.up_scale is small["up"]["weight"].scale
    )
    np.testing.assert_array_equal(weights.down, small["down"]["weight"].codes.T)
    whole = weights.down * weights.hidden_scale[:, None] * weights.down_scale
    exact = small["down"]["weight"].rows(jnp.arange(cfg.hidden_size)).T
    np.testing.assert_allclose(whole, exact, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_listed_and_masked_blocks_of_8_bits_are_the_same(name, size):
    cfg = CONFIGS[name]
    dense = quantize_params(cfg, params_of(name), "int8")["layers"][1]["mlp"]
    x = jax.random.normal(jax.random.key(0), (1, size, cfg.hidden_size))
    listed, masked = (sparse(cfg, dense, 0.4, unions=unions) for unions in ((0.1,) * 4, (1.0,) * 4))
    assert listed.lists(size, CPU) and not masked.lists(size, CPU)
    found, wanted = (feed_forward(cfg, block, x, 1, CPU) for block in (listed, masked))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["parallel"])
def test_an_8_bit_sparse_model_decodes_what_it_reads(name):
    """One token at a time, in lists, or all at once, masked."""
    cfg = CONFIGS[name]
    params = quantize_params(cfg, with_sparse_blocks(cfg, params_of(name), 0.25), "int8")
    lm = LM(cfg, params)
    (done,) = lm.generate([[3, 1, 4, 1]], **NEW)
    logits = lm.logits(np.asarray([[3, 1, 4, 1, *done.tokens]]))[0, 3:-1]
    assert np.argmax(logits, axis=-1).tolist() == done.tokens


def test_a_smoothed_sparse_block_loses_less():
    """Channels of a hundred times the size of others, as real models have them."""
    cfg = CONFIGS["llama"]
    blocks = with_sparse_blocks(cfg, dense_of("llama"), 0.5)
    smooth, flat = quantize_params(cfg, blocks, "int8"), quantize_weights(blocks, "int8")
    exact = logits_of(cfg, blocks)
    errors = [float(jnp.abs(logits_of(cfg, p) - exact).mean()) for p in (smooth, flat)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("weights, backend", [("int4", None), ("int8", Backend.of("triton"))])
def test_packed_formats_leave_sparse_blocks_as_they_are(weights, backend):
    cfg = CONFIGS["llama"]
    params = with_sparse_blocks(cfg, params_of("llama"), 0.5)
    small = quantize_params(cfg, params, weights, backend=backend)
    assert small["layers"][0]["mlp"] is params["layers"][0]["mlp"]
    assert isinstance(small["layers"][0]["attn"]["q"]["weight"], PackedWeight)


def test_a_packed_block_is_taken_in_full():
    cfg = CONFIGS["llama"]
    small = quantize_params(cfg, params_of("llama"), "int4")
    dense, x = small["layers"][0]["mlp"], jax.random.normal(jax.random.key(1), (1, 3, 32))
    block = sparse(cfg, dense, 1.0)
    assert block.weights.up.dtype == jnp.float32 and not block.weights.is_int8
    found, wanted = (np.asarray(feed_forward(cfg, b, x, 0)).ravel() for b in (block, dense))
    assert np.corrcoef(found, wanted)[0, 1] > 0.9999  # activations of the kernel are bfloat16


def test_a_block_in_8_bits_reads_a_byte_per_number():
    """dejavu.md 6.10"""
    cfg = CONFIGS["llama"]
    block = quantize_params(cfg, with_sparse_blocks(cfg, params_of("llama"), 0.25), "int8")
    block = block["layers"][0]["mlp"]
    d, f = cfg.hidden_size, cfg.intermediate_size
    shared = 4 * (6 * d + 6 * f // SIZE) + 4 * d  # the router, and down's scales
    assert block.read_bytes(1, CPU) == shared + round(0.25 * f * (3 * d + 3 * 4))


def test_factors_that_norms_took_are_no_parameters():
    cfg, params = CONFIGS["llama"], params_of("llama")
    small = quantize_params(cfg, params, "int8")
    assert size_of(small) == size_of(params)
    matrices = [x for x in jax.tree.leaves(small["layers"]) if x.ndim == 2]
    assert all(x.dtype == jnp.int8 for x in matrices)
    d, f, heads = cfg.hidden_size, cfg.intermediate_size, cfg.num_heads * cfg.head_dim
    vectors = {"attn_norm": d, "mlp_norm": d, "out smooth": heads, "down smooth": f}
    outputs = 2 * f + 2 * d + 2 * cfg.num_kv_heads * cfg.head_dim + heads
    layer = sum(x.size for x in matrices) // cfg.num_layers + 4 * (sum(vectors.values()) + outputs)
    head = small["head"]["weight"]
    head_bytes = head.codes.size + 4 * (head.scale.size + d)
    assert step_bytes(cfg, small) == cfg.num_layers * layer + head_bytes + 4 * d


def test_a_block_that_is_not_known_leaves_its_norm_as_it_is():
    """Its readers cannot be told."""
    cfg = CONFIGS["parallel"]

    class Unknown(SparseMlp):
        def as_dense(self):
            return None

    jax.tree_util.register_dataclass(
        Unknown, data_fields=["weights", "selector"], meta_fields=["unions"]
    )
    params = with_sparse_blocks(cfg, params_of("parallel"), 0.5)
    layers = tuple(
        layer | {"mlp": Unknown(**{n: getattr(layer["mlp"], n) for n in ("weights", "selector")})}
        for layer in params["layers"]
    )
    params = params | {"layers": layers}
    _, factors = smoothing(cfg, params, calibration_tokens(cfg, None))
    assert not factors.divided
    small = quantize_params(cfg, params, "int8")
    assert list(small["layers"][0]["attn_norm"]) == list(params["layers"][0]["attn_norm"])
    assert isinstance(small["layers"][0]["attn"]["q"]["weight"], Int8Weight)
    assert isinstance(small["layers"][0]["mlp"].weights, BlockWeights)
    exact, found = (np.asarray(logits_of(cfg, p)).ravel() for p in (params, small))
    assert np.corrcoef(exact, found)[0, 1] > 0.998


def test_thresholds_survive_8_bits():
    cfg = CONFIGS["llama"]
    block = SparseMlp.of(
        params_of("llama")["layers"][1]["mlp"], router(cfg, Rule(threshold=0.5)), unions=(0.4,)
    )
    params = params_of("llama")
    params = params | {"layers": (params["layers"][0], params["layers"][1] | {"mlp": block})}
    small = quantize_params(cfg, params, "int8")["layers"][1]["mlp"]
    assert isinstance(small.selector, Router) and isinstance(block.selector, Router)
    assert small.selector.rule == block.selector.rule and small.unions == (0.4,)
    np.testing.assert_array_equal(small.selector.outer, block.selector.outer)


def test_a_masked_block_is_stored_in_8_bits():
    """What it selects by are hidden values, which no factor has changed."""
    cfg, dense = CONFIGS["parallel"], dense_of("parallel")
    half = LargestHidden(most=jnp.int32(cfg.intermediate_size // 2))
    layers = tuple(
        layer | {"mlp": MaskedMlp(dense=layer["mlp"], criterion=half)} for layer in dense["layers"]
    )
    params = dense | {"layers": layers}
    small = quantize_params(cfg, params, "int8")
    assert isinstance(small["layers"][0]["mlp"].dense["up"]["weight"], Int8Weight)
    assert "divisor" in small["layers"][0]["attn_norm"]
    exact, found = (np.asarray(logits_of(cfg, p)).ravel() for p in (params, small))
    assert np.corrcoef(exact, found)[0, 1] > 0.99


@pytest.mark.parametrize("heads_first", [True, False])
def test_routers_of_heads_select_the_same_in_an_8_bit_model(heads_first):
    cfg, rule = CONFIGS["learned"], Rule(most=2)
    exact = with_random_heads(cfg, dense_of("learned"), rule)
    if heads_first:
        small = quantize_params(cfg, exact, "int8")
    else:
        small = with_random_heads(cfg, dense_of("learned", "int8"), rule)
    assert "divisor" in small["layers"][0]["attn_norm"]
    found, wanted, dense = (
        np.asarray(logits_of(cfg, p)).ravel() for p in (small, exact, dense_of("learned"))
    )
    assert np.corrcoef(found, wanted)[0, 1] > 0.99 > np.corrcoef(dense, wanted)[0, 1]
