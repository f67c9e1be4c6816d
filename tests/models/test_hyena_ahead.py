"""Exact filters summed ahead of the text, in tiles and in epochs: the same text as summed anew."""

from dataclasses import replace

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.base import bytes_of
from jaxinfer.lm import LM
from jaxinfer.models.hyena_ahead import convolved_tile
from jaxinfer.models.hyena_state import outputs_ahead
from jaxinfer.models.stack import (
    cache_bytes_per_row,
    cache_geometry,
    grow_cache,
    init_cache,
    layer_policies,
)
from tests.factories import random_tokens
from tests.models.hyena_models import CONFIGS, params_of
from tests.models.test_hyena import TOLERANCE, counted, plain, read_on

ORDERS = ["multi", pytest.param("third", marks=pytest.mark.slow)]
FORMS = ["tiled", "epoched"]


def lm_of(name: str, form) -> LM:
    cfg = CONFIGS[name]
    ahead = replace(cfg, hyena=replace(cfg.hyena, exact=form))
    return LM(ahead, params_of(cfg), name=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ORDERS)
def test_steps_behind_unequal_prompts_are_one_text(name, form):
    """laughing_hyena.md 5.3; with a row that waits, a cache that is full and grows, and a chunk
    behind the steps."""
    lm = lm_of(name, form)
    tokens, place = random_tokens(2, 40), [0, 0]
    whole = np.asarray(plain(lm.config, lm.params, tokens))
    cache = init_cache(lm.config, lm.params, ji.full(), 2, 16)
    untouched = lambda layer: jax.tree.map(lambda x: x[1], cache.layers[layer])  # noqa: E731

    def go(*counts: int):
        nonlocal cache
        size = max(counts)
        rows = zip(tokens, place, strict=True)
        part = jnp.stack([jnp.resize(row[p : p + size], size) for row, p in rows])
        before = untouched(0)
        logits, cache = read_on(lm, cache, part, counted(*counts))
        for row, count in enumerate(counts):
            expected = whole[row, place[row] : place[row] + count]
            np.testing.assert_allclose(logits[row, :count], expected, atol=TOLERANCE)
            place[row] += count
        if counts[1] == 0:
            jax.tree.map(np.testing.assert_array_equal, untouched(0), before)

    go(7, 3)
    for step in range(9):  # the first row fills its cache
        go(1, int(step not in (2, 3)))
    cache = grow_cache(lm.config, cache, 32)
    for _ in range(4):
        go(1, 1)
    go(5, 7)
    for _ in range(3):
        go(1, 1)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_ahead_is_as_its_formula_says(form):
    lm, cached = (lm_of("multi", one) for one in (form, "cached"))
    width, n = lm.config.hidden_size, lm.config.hyena.head_size
    policy = layer_policies(lm.config, ji.full(), lm.params)[2]
    outputs = {"tiled": 65, "epoched": 16}[form]  # sqrt(64 * 6) is 20
    assert outputs_ahead(policy, 64) == outputs
    geometry = cache_geometry(lm.config, 64)
    more, less = (cache_bytes_per_row(one.config, ji.full(), geometry) for one in (lm, cached))
    assert more - less == 4 * outputs * width * n + 4
    cache = init_cache(lm.config, lm.params, ji.full(), 2, 64)
    assert bytes_of(cache.layers) == 2 * more
    assert not policy.fixed_size and not policy.endless


@pytest.mark.parametrize("form", ["tiled", pytest.param("epoched", marks=pytest.mark.slow)])
def test_the_loop_writes_what_the_model_s_own_convolutions_predict(form):
    lm, prompts = lm_of("multi", form), [[1, 2, 3], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    texts = lm.generate(prompts, max_new_tokens=30)
    whole = np.zeros((2, 40), np.int32)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        whole[row, : len(prompt) + 30] = [*prompt, *text.tokens]
    logits = np.asarray(plain(lm.config, lm.params, whole))
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        predicted = logits[row, len(prompt) - 1 : len(prompt) + 29]
        chosen = predicted[np.arange(30), text.tokens]
        assert (predicted.max(axis=1) - chosen < TOLERANCE).all()
        assert len(set(text.tokens)) > 2


def test_drafts_are_refused():
    with pytest.raises(ValueError, match="tiled filters take one token at a time and no drafts"):
        ji.speculate(lm_of("multi", "cached"), lm_of("multi", "tiled"), ji.Topology.chain(2))


def test_tiles_take_a_fifth_of_the_direct_products():
    """laughing_hyena.md 5.5, of 4,096 tokens; counted in the program of each tile."""

    def products(tile: int) -> float:
        u, h = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, tile, 1, 1), (1, 8192)))
        jaxpr = jax.make_jaxpr(convolved_tile)(u, jax.eval_shape(lambda h: h[:, : 2 * tile], h))
        return counted_in(jaxpr.jaxpr, tile)

    tiles = [i & -i for i in range(1, 4096)]
    cost = {tile: products(tile) for tile in set(tiles)}
    direct = 4096 * 4095 / 2
    assert 0 < sum(cost[tile] for tile in tiles) < direct / 5


def counted_in(jaxpr, tile: int) -> float:
    """Multiply-adds: of matrices as they are, of a real transform of n points n log2 n."""
    found = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += tile * tile
        elif eqn.primitive.name == "fft":
            found += 2 * tile * np.log2(2 * tile)
        found += sum(counted_in(x, tile) for x in jax.extend.core.jaxprs_in_params(eqn.params))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_session_forks_and_comes_back_from_a_file(form, tmp_path):
    lm = lm_of("multi", form)
    session = lm.session()
    session.append([1, 2, 3, 4, 5, 6, 7])
    session.save(tmp_path / "kept")
    expected = lm.generate([[1, 2, 3, 4, 5, 6, 7, 8]], max_new_tokens=8)[0].tokens
    for one in (session.fork(), lm.restore(tmp_path / "kept"), session):
        assert one.generate([8], max_new_tokens=8).tokens == expected


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_rows_that_come_and_go_have_clocks_of_their_own(form):
    """Continuous batching: texts that start when others are in the middle of theirs."""
    lm = lm_of("multi", form)
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11, 12, 13], [4], [20, 21, 22, 23, 24]]
    expected = [one.tokens for one in lm.generate(prompts, max_new_tokens=20)]
    with lm.batcher(slots=2, context=64, chunk=16) as batcher:
        lengths = (20, 9, 20, 15)
        tickets = [
            batcher.submit(prompt, max_new_tokens=length)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        found = [ticket.result().tokens for ticket in tickets]
    assert found == [text[:length] for text, length in zip(expected, lengths, strict=True)]
