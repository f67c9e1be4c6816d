"""A random Hyena language model distilled: laughing_hyena.md 5.6, the first check."""

import numpy as np
import pytest

import jaxinfer as ji
from tools.reproduce.reproduce_laughing_hyena import random_model


@pytest.mark.slow
def test_logits_of_a_random_model_come_back_as_modes_grow():
    """Relative logit errors below 2e-2, 6e-3 and 2e-3 with as many modes as filters need for errors
    of 0.1, 0.03 and 0.01. The likeliest tokens say nothing: the model repeats its input."""
    lm = random_model(quick=False)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 256))
    exact = np.asarray(lm.logits(tokens))
    errors = []
    for modes in (30, 53, 73):
        found = ji.distill(lm, modes, method="balanced", taps=0, all_modal=True)
        errors.append(np.linalg.norm(found.logits(tokens) - exact) / np.linalg.norm(exact))
    assert errors == sorted(errors, reverse=True)
    assert (np.array(errors) < (2e-2, 6e-3, 2e-3)).all(), errors
    assert errors[0] > 1e-7  # or nothing was lost
