"""A random Hyena language model distilled: laughing_hyena.md 5.6, the first check."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.distill.filters.modes import stack
from jaxinfer.distill.filters.realize import balanced_modes
from jaxinfer.models.filter_form import distilled, long_filters
from tools.reproduce.reproduce_laughing_hyena import random_model


def as_trained_from(lm: ji.LM) -> ji.LM:
    """Matrices N(0, 0.02^2), those that write into the residual stream over sqrt(2 layers), biases
    zero: the start of Hyena's own training (laughing_hyena.md 2.2)."""
    rng, scale = np.random.default_rng(1), (2 * lm.config.num_layers) ** -0.5

    def drawn(path, leaf):
        names = [getattr(part, "key", "") for part in path]
        if names[-1] == "bias" and "short" not in names:
            return jnp.zeros_like(leaf) if "norm" not in names[-2] else leaf
        if names[-1] not in ("weight", "tokens"):
            return leaf
        share = scale if names[-2] in ("out", "down") else 1
        return jnp.asarray(0.02 * share * rng.normal(size=leaf.shape), leaf.dtype)

    return replace(lm, params=jax.tree_util.tree_map_with_path(drawn, lm.params))


@pytest.mark.slow
def test_logits_of_a_random_model_come_back_as_modes_grow():
    """Relative logit errors below 2e-2, 6e-3 and 2e-3 with as many modes as filters need for errors
    of 0.1, 0.03 and 0.01. The likeliest tokens say nothing: the model repeats its input."""
    lm = as_trained_from(random_model(quick=False))
    tokens = np.random.default_rng(0).integers(0, 256, (4, 256))
    exact, errors = np.asarray(lm.logits(tokens)), []
    for count in (30, 53, 73):
        made = []
        for h in long_filters(lm.config, lm.params):
            fitted = stack(balanced_modes(np.asarray(h, np.float64)[:, 1:], count), count)
            made.append(replace(fitted, h0=h[:, 0]))
        found = ji.LM(*distilled(lm.config, lm.params, made), name="distilled")
        errors.append(np.linalg.norm(found.logits(tokens) - exact) / np.linalg.norm(exact))
    assert errors == sorted(errors, reverse=True)
    assert (np.array(errors) < (2e-2, 6e-3, 2e-3)).all(), errors
    assert errors[0] > 1e-7  # or nothing was lost
