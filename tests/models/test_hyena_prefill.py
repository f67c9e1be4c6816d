"""How a prompt becomes the state of modes, and which filters its own outputs come from.

That all ways lead to one state is in `hyena_float64.py`.
"""

import math
from dataclasses import replace

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.context import chain_context
from jaxinfer.models.filter_form import with_filters
from jaxinfer.models.hyena_prefill import state_of
from jaxinfer.models.params import abstract_params
from jaxinfer.models.stack import init_cache
from jaxinfer.nn.hyena import modal_part
from tests.factories import random_tokens
from tests.models.hyena_models import FILTER, MODES, MULTI, lm_of
from tests.models.test_hyena import TOLERANCE, counted, plain, push, read


@pytest.mark.parametrize("way", ["chunked", "scan", "recurrence", "vandermonde", "fft"])
def test_no_way_of_prefill_holds_filters_by_modes_by_tokens(way):
    modes, size = 16, 640
    cfg = replace(
        MODES,
        hyena=replace(MODES.hyena, prefill=way, filter=replace(FILTER, kind="modal", modes=modes)),
    )
    params = abstract_params(cfg)["layers"][0]["hyena"]
    inputs = jax.ShapeDtypeStruct((1, size, cfg.hidden_size), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, u: state_of(cfg, modal_part(p), u))(params, inputs)
    assert cfg.hidden_size * modes in elements_made(jaxpr.jaxpr)
    assert max(elements_made(jaxpr.jaxpr)) < cfg.hidden_size * modes * size / 2


def test_a_prompt_may_be_read_by_the_filters_that_modes_were_made_from():
    """Outputs of the prompt are the exact model's, the state behind it the modes'."""
    lm, tokens = lm_of("multi"), random_tokens(1, 10)
    cfg = replace(MULTI, hyena=replace(MULTI.hyena, prompt="exact"))
    exact, params = with_filters(MULTI, lm.params, "exact")
    cache = init_cache(cfg, lm.params, ji.full(), 1, 16)
    ctx = chain_context(cache.length, counted(10), 10, reads=False, is_prompt=True)
    out = read(cfg, lm.params, cache, tokens, ctx)
    expected = np.asarray(plain(exact, params, tokens))
    np.testing.assert_allclose(out.logits, expected, atol=TOLERANCE)
    usual = read(MULTI, lm.params, cache, tokens, ctx)
    assert np.abs(usual.logits - expected).max() > 0.1
    kept = push(cfg, lm.params, cache, out.fresh, None, counted(10)).layers[0]
    other = push(MULTI, lm.params, cache, usual.fresh, None, counted(10)).layers[0]
    jax.tree.map(np.testing.assert_array_equal, kept, other)


def elements_made(jaxpr) -> set[int]:
    """The sizes of all arrays that a program computes."""
    found = {math.prod(out.aval.shape) for eqn in jaxpr.eqns for out in eqn.outvars}
    for eqn in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found |= elements_made(inner)
    return found
