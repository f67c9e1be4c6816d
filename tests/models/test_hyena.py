"""Hyena layers of every form, alone and beside attention: one text, however it is read."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.context import chain_context
from jaxinfer.config import ModelConfig
from jaxinfer.decode.capacity import ENDLESS, capacity_for, is_endless, is_fixed_size
from jaxinfer.decode.engine import SMALLEST_CAPACITY
from jaxinfer.hyena_config import FilterConfig, HyenaConfig
from jaxinfer.io.checkpoint import Checkpoint, load_checkpoint_folder, save_checkpoint
from jaxinfer.lm import LM
from jaxinfer.models.filter_form import distilled, long_filters
from jaxinfer.models.params import (
    abstract_params,
    cast_params,
    init_params,
    is_filter,
    named_leaves,
)
from jaxinfer.models.quantize import quantize_params
from jaxinfer.models.stack import (
    cache_bytes_per_row,
    cache_geometry,
    commit,
    forward,
    grow_cache,
    init_cache,
)
from jaxinfer.nn.filters import ImplicitFilter
from jaxinfer.nn.modal import ModalFilter
from jaxinfer.speculative.step import tree_context
from jaxinfer.speculative.topology import Topology
from jaxinfer.testing.quick import quick_jit
from tests.factories import PieceTokenizer, random_tokens
from tests.models.hyena_models import CONFIGS, MODES, MULTI, THIRD, lm_of

TREE = Topology.from_children([[[[]], []], [[]], []])  # 8 nodes, 4 levels
TOLERANCE = 1e-4  # of logits of size 6
EVERY = [
    "multi",
    pytest.param("third", marks=pytest.mark.slow),
    pytest.param("modes", marks=pytest.mark.slow),
]


@quick_jit
def read(cfg, params, cache, tokens, ctx):
    return forward(cfg, params, tokens, cache, ctx)


@quick_jit
def plain(cfg, params, tokens):
    return forward(cfg, params, tokens).logits


@quick_jit
def push(cfg, params, cache, fresh, accepted, count):
    return commit(cfg, params, cache, fresh, accepted, count)


def response_of(own):
    """A layer's implicit filter without its skip connection."""
    module = ImplicitFilter(len(own["skip"]), MULTI.max_positions, MULTI.hyena.filter)
    return module.apply({"params": own["filter"]}, MULTI.max_positions)


def counted(*numbers: int):
    return jnp.asarray(numbers, jnp.int32)


def read_on(lm: LM, cache, tokens, count):
    """The logits behind a chunk of which each row has `count` tokens, and the cache behind it."""
    ctx = chain_context(cache.length, count, tokens.shape[1])
    out = read(lm.config, lm.params, cache, tokens, ctx)
    return out.logits, push(lm.config, lm.params, cache, out.fresh, None, count)


def one_by_one(lm: LM, cache, tokens):
    found = []
    for token in tokens.T:
        logits, cache = read_on(lm, cache, token[:, None], counted(*[1] * len(token)))
        found.append(logits[:, 0])
    return np.stack(found, axis=1), cache


@pytest.mark.parametrize("name", EVERY)
def test_chunks_steps_and_unequal_rows_are_one_text(name):
    """laughing_hyena.md 5.3: prefill and decode, through modes and through stored inputs."""
    lm = lm_of(name)
    tokens = random_tokens(2, 16)
    whole = np.asarray(plain(lm.config, lm.params, tokens))
    cache = init_cache(lm.config, lm.params, ji.full(), 2, 16)
    first, cache = read_on(lm, cache, tokens[:, :10], counted(10, 3))
    np.testing.assert_allclose(first[0], whole[0, :10], atol=TOLERANCE)
    np.testing.assert_allclose(first[1, :3], whole[1, :3], atol=TOLERANCE)
    second = jnp.stack([jnp.pad(tokens[0, 10:], (0, 4)), tokens[1, 3:13]])
    logits, cache = read_on(lm, cache, second, counted(2, 10))
    np.testing.assert_allclose(logits[0, :2], whole[0, 10:12], atol=TOLERANCE)
    np.testing.assert_allclose(logits[1], whole[1, 3:13], atol=TOLERANCE)
    steps, _ = one_by_one(lm, cache, jnp.stack([tokens[0, 12:15], tokens[1, 13:]]))
    np.testing.assert_allclose(steps[0], whole[0, 12:15], atol=TOLERANCE)
    np.testing.assert_allclose(steps[1], whole[1, 13:], atol=TOLERANCE)


@pytest.mark.parametrize("name", EVERY)
def test_every_path_of_a_tree_is_a_text_and_rejected_nodes_leave_no_trace(name):
    """laughing_hyena.md 4.5 and 5.3, in float32."""
    lm = lm_of(name)
    text, nodes = random_tokens(1, 10), random_tokens(1, TREE.nodes, seed=1)
    cache = init_cache(lm.config, lm.params, ji.full(), 1, 16)
    _, cache = read_on(lm, cache, text, counted(10))
    out = read(lm.config, lm.params, cache, nodes, tree_context(TREE, cache.length))
    kept = push(lm.config, lm.params, cache, out.fresh, jnp.zeros((1, 4), jnp.int32), counted(0))
    jax.tree.map(np.testing.assert_array_equal, kept.layers, cache.layers)
    following = random_tokens(1, 1, seed=2)
    for node in range(TREE.nodes):
        path = np.flatnonzero(TREE.ancestors[node])
        whole = np.concatenate([text, nodes[:, path], following], axis=1)
        padded = np.pad(whole, [(0, 0), (0, 16 - whole.shape[1])])
        linear = np.asarray(plain(lm.config, lm.params, padded))[:, 10 : whole.shape[1]]
        np.testing.assert_allclose(out.logits[:, path], linear[:, :-1], atol=TOLERANCE)
        accepted = jnp.asarray([[*path, *[0] * (TREE.levels - len(path))]], jnp.int32)
        after = push(lm.config, lm.params, cache, out.fresh, accepted, counted(len(path)))
        logits, _ = read_on(lm, after, following, counted(1))
        np.testing.assert_allclose(logits[:, 0], linear[:, -1], atol=TOLERANCE)


@pytest.mark.parametrize("name", EVERY)
def test_the_loop_writes_what_the_model_s_own_convolutions_predict(name):
    """laughing_hyena.md 5.6, on prompts of unequal length: each as if it were alone."""
    lm = lm_of(name)
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]]
    texts = lm.generate(prompts, max_new_tokens=14)
    assert len(set(texts[0].tokens)) > 2
    for prompt, text in zip(prompts, texts, strict=True):
        whole = np.zeros((1, 32), np.int32)
        whole[0, : len(prompt) + 14] = [*prompt, *text.tokens]
        logits = np.asarray(plain(lm.config, lm.params, whole))[
            0, len(prompt) - 1 : len(prompt) + 13
        ]
        chosen = logits[np.arange(14), text.tokens]
        assert (logits.max(axis=1) - chosen < TOLERANCE).all()


@pytest.mark.slow
def test_many_prompts_of_unequal_length_are_continued_as_by_convolutions():
    """laughing_hyena.md 5.6: 64 prompts, 256 tokens, far beyond the filters' own positions."""
    lm, random = lm_of("modes"), np.random.default_rng(5)
    prompts = [random.integers(0, 60, random.integers(1, 30)).tolist() for _ in range(64)]
    with pytest.warns(UserWarning, match="exceed the model's 160 positions"):
        texts = lm.generate(prompts, max_new_tokens=256)
    whole = np.zeros((64, 288), np.int32)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        whole[row, : len(prompt) + 256] = [*prompt, *text.tokens]
    for row, prompt in enumerate(prompts):
        logits = np.asarray(plain(lm.config, lm.params, whole[row : row + 1]))[0]
        logits = logits[len(prompt) - 1 : len(prompt) + 255]
        chosen = logits[np.arange(256), texts[row].tokens]
        assert (logits.max(axis=1) - chosen < TOLERANCE).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_target_and_draft(name):
    """Every guess is right only if each node stepped on from the state of its own parent."""
    lm, prompt = lm_of(name), [1, 2, 3, 4, 5]
    plain = lm.generate([prompt], max_new_tokens=25)[0]
    draft = LM(lm.config, lm.params, name="itself")
    found = ji.speculate(target=lm, draft=draft, topology=TREE).generate(
        [prompt], max_new_tokens=25
    )[0]
    assert found.tokens == plain.tokens
    assert found.stats.tokens_per_step == TREE.levels
    looked = ji.speculate(target=lm, draft="prompt-lookup", topology=Topology.chain(4))
    assert looked.generate([prompt], max_new_tokens=25)[0].tokens == plain.tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_session_forks_and_comes_back_from_a_file(name, tmp_path):
    lm = lm_of(name)
    session = lm.session()
    session.append([1, 2, 3, 4, 5, 6, 7])
    session.save(tmp_path / "kept")
    expected = lm.generate([[1, 2, 3, 4, 5, 6, 7, 8]], max_new_tokens=8)[0].tokens
    for one in (session.fork(), lm.restore(tmp_path / "kept"), session):
        assert one.generate([8], max_new_tokens=8).tokens == expected


@pytest.mark.slow
def test_a_text_without_end_stays_finite_in_constant_memory():
    letters = PieceTokenizer([bytes([64 + i]) for i in range(MODES.vocab_size - 2)])
    lm = LM(MODES, lm_of("modes").params, letters)
    warm = ji.Sampler(temperature=1.2)  # a greedy random model soon repeats itself
    stream = lm.stream("ABC", max_new_tokens=None, sampler=warm)
    for _ in itertools.islice(stream, 500):  # three times the model's positions
        pass
    stream.close()
    found = stream.completion
    assert np.isfinite(found.log_probs).all() and len(set(found.tokens)) > 10
    bounded = lm.generate("ABC", max_new_tokens=40, sampler=warm)[0]
    assert found.tokens[:40] == bounded.tokens
    assert found.stats.cache_bytes == bounded.stats.cache_bytes


def test_filters_are_float32_whatever_becomes_of_the_model(tmp_path):
    """laughing_hyena.md 5.4: a cast, a folder in another dtype, int8 rows and int8 weights."""
    lm = lm_of("multi")
    own = {name: x for name, x in named_leaves(lm.params).items() if is_filter(name)}
    assert {name.split(".")[3] for name in own} == {"filter", "modal", "short", "skip"}
    checkpoint = Checkpoint(lm.config, cast_params(lm.params, jnp.bfloat16))
    found = {
        "init": jax.eval_shape(
            lambda key: init_params(MULTI, key, jnp.bfloat16), jax.random.key(0)
        ),
        "abstract": abstract_params(lm.config, jnp.bfloat16),
        "cast": checkpoint.params,
    }
    whole = Checkpoint(lm.config, lm.params)
    for rows, one, dtype in ((False, whole, "bfloat16"), (True, checkpoint, "float32")):
        save_checkpoint(tmp_path / dtype, one, int8_rows=rows)
        stored = load_checkpoint_folder(tmp_path / dtype, dtype)
        assert stored.config == lm.config
        found[f"folder, {dtype}"] = stored.params
    found["int8"] = quantize_params(lm.config, lm.params, "int8")
    for what, params in found.items():
        leaves = named_leaves(params)
        for name, leaf in own.items():
            assert leaves[name].dtype == jnp.float32, (what, name)
            if what not in ("init", "abstract"):
                np.testing.assert_array_equal(leaves[name], leaf, err_msg=f"{what}: {name}")
    assert checkpoint.params["layers"][0]["hyena"]["in"]["weight"].dtype == jnp.bfloat16


def test_a_layer_takes_modes_and_goes_back_to_its_own_filter(tmp_path):
    """What distillation reads and what it writes; the two layers' filters are one function."""
    lm, asked = lm_of("multi"), ["exact", "modal", "exact"]
    h, _, other = long_filters(lm.config, lm.params)
    assert h is not None and other is not None and h.shape == other.shape == (8, 160)
    own = lm.params["layers"][2]["hyena"]
    np.testing.assert_allclose(other[:, 0] - own["skip"], response_of(own)[:, 0], atol=1e-6)
    modal = ModalFilter(**lm.params["layers"][0]["hyena"]["modal"])
    config, params = distilled(lm.config, lm.params, [None, None, modal])
    assert config.hyena == replace(MULTI.hyena, modes=(5, 0, 5))
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config))
    with pytest.raises(ValueError, match="layer 1 has 0 long filters, got modes of 8"):
        distilled(lm.config, lm.params, [None, modal, None])
    with pytest.raises(ValueError, match="layer 0: a must be float32, got bfloat16"):
        half = replace(modal, a=modal.a.astype(jnp.bfloat16))
        distilled(lm.config, lm.params, [half, None, None])
    save_checkpoint(tmp_path / "model", Checkpoint(lm.config, lm.params))
    found = ji.load(tmp_path / "model", filters=asked)
    assert found.config.hyena == replace(MULTI.hyena, modes=None, taps=None)
    assert "modal" not in found.params["layers"][0]["hyena"]
    assert not is_fixed_size(found, ji.full())
    assert ji.load(tmp_path / "model").config == lm.config
    with pytest.raises(ValueError, match="layer 2 has no modes; distil the model first"):
        ji.load(tmp_path / "model", filters="modal")
    with pytest.raises(ValueError, match="filters has 2 entries for 3 layers"):
        ji.load(tmp_path / "model", filters=asked[:2])
    with pytest.raises(ValueError, match="filters must be one of 'modal', 'exact', .*; got 'fast'"):
        ji.load(tmp_path / "model", filters="fast")
    tiled = ji.load(tmp_path / "model", filters=["modal", "tiled", "tiled"])
    assert tiled.config.hyena == replace(MULTI.hyena, exact="tiled")
    with pytest.raises(ValueError, match="names epoched and exact; all layers that are not modal"):
        ji.load(tmp_path / "model", filters=["epoched", "modal", "exact"])
    with pytest.raises(ValueError, match="tiled filters take one token at a time and no drafts"):
        ji.speculate(tiled, "prompt-lookup", TREE)
    assert found.config.hyena.exact == "cached" and "modal" not in found.params["layers"][2]
    with pytest.raises(ValueError, match="filters='exact' is for models with long filters"):
        ji.load("tiny-llama", filters="exact")


def test_what_a_layer_keeps_is_as_its_formula_says():
    geometry = cache_geometry(MULTI, 16)
    cache = init_cache(MULTI, lm_of("multi").params, ji.full(), 2, 16)
    width, short = MULTI.hidden_size, 2 * 3 * MULTI.hidden_size * 4
    modes, inputs = 8 * width * 4 * 5, 16 * 2 * width * 4
    attention = 2 * 16 * MULTI.num_kv_heads * MULTI.head_dim * 4
    expected = 2 * short + modes + inputs + attention
    assert cache_bytes_per_row(MULTI, ji.full(), geometry) == expected
    assert bytes_of(cache.layers) == 2 * expected
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(cache.layers))
    grown = grow_cache(MULTI, cache, 64)
    assert grown.layers[0].re.shape == cache.layers[0].re.shape
    assert grown.layers[2].inputs.shape[1] == 64
    for name, fixed in {"multi": False, "modes": True}.items():
        for policy in (ji.full(), ji.streaming(4, 28)):
            assert is_fixed_size(lm_of(name), policy) == fixed
            assert is_endless(lm_of(name), policy) == fixed


def test_a_step_by_modes_makes_no_array_as_long_as_a_text():
    """laughing_hyena.md 5.5, of a distilled model that keeps its long filters beside its modes."""
    long = 7919  # no other size
    cfg = replace(
        MULTI, num_layers=1, mixers=("hyena",), max_positions=long,
        hyena=replace(MULTI.hyena, modes=(5,)),
    )  # fmt: skip
    params = abstract_params(cfg)

    def step(params, cache, tokens):
        out = forward(cfg, params, tokens, cache)
        return commit(cfg, params, cache, out.fresh, None, counted(1), out.logits)

    cache = jax.eval_shape(lambda: init_cache(cfg, params, ji.full(), 1, long))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    made = sizes_made(jax.make_jaxpr(step)(params, cache, tokens).jaxpr)
    assert 4 * 4 in made and long not in made
    assert long not in {size for leaf in jax.tree.leaves(cache) for size in leaf.shape}


def sizes_made(jaxpr) -> set[int]:
    """The lengths of all axes of what a program computes."""
    found = {size for eqn in jaxpr.eqns for out in eqn.outvars for size in out.aval.shape}
    for eqn in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found |= sizes_made(inner)
    return found


def test_a_text_longer_than_its_filters_is_refused():
    long = [list(range(50)) * 4]
    with pytest.raises(ValueError, match="200 context . 4 new tokens exceed the model's 160"):
        lm_of("multi").generate(long, max_new_tokens=4)
    with pytest.raises(ValueError, match="200 tokens exceed the 160 lags of the filters"):
        lm_of("multi").logits(np.asarray(long))
    with pytest.raises(ValueError, match="long convolutions keep every token; give max_new_tokens"):
        capacity_for(lm_of("multi"), ji.streaming(4, 28), 2, ENDLESS)
    with pytest.warns(UserWarning, match="lower max_new_tokens: what lies beyond them is not what"):
        assert capacity_for(lm_of("modes"), ji.full(), 200, 4) == SMALLEST_CAPACITY
    assert capacity_for(lm_of("modes"), ji.full(), 200, ENDLESS) == SMALLEST_CAPACITY


def test_a_config_says_what_it_cannot_be():
    assert ModelConfig.from_dict(MULTI.to_dict()) == MULTI
    data = THIRD.to_dict()
    data["hyena"] |= {"modes": [4, 0], "taps": [2, 0]}  # as JSON has them
    assert ModelConfig.from_dict(data) == THIRD
    with pytest.raises(ValueError, match="unknown config fields \\['heads'\\]"):
        ModelConfig.from_dict({**data, "hyena": {"heads": 4}})
    with pytest.raises(ValueError, match="give hyena exactly when mixers name it"):
        replace(MULTI, hyena=None)
    with pytest.raises(ValueError, match="heads of size 4 need order 2, got 3"):
        HyenaConfig(head_size=4, order=3)
    with pytest.raises(ValueError, match="hidden_size 32 must be a multiple of hyena head_size 5"):
        replace(MULTI, hyena=HyenaConfig(head_size=5))
    with pytest.raises(ValueError, match="modes has 2 entries for 3 layers"):
        replace(MULTI, hyena=HyenaConfig(modes=(4, 4)))
    with pytest.raises(ValueError, match="filter kind 'modal' and modes=0 disagree"):
        FilterConfig(kind="modal")
    with pytest.raises(ValueError, match="features must be odd and at least 3, got 4"):
        FilterConfig(features=4)
    assert MULTI.first(1).hyena == replace(MULTI.hyena, modes=(5,))
    assert replace(MULTI, mixers=("attn", "hyena", "attn")).first(1).hyena is None


@pytest.mark.slow  # twelve seconds; the same identities in float32 are above
def test_identities_hold_in_float64():
    """laughing_hyena.md 5.3 and 5.4: see `hyena_float64.py`, a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.hyena_float64"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 7
