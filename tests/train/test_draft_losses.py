"""The losses of drafts against NumPy and scipy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax, rel_entr, softmax

from jaxinfer.models import stack
from jaxinfer.models.recurrent import guesses, read
from jaxinfer.testing.quick import quick_jit
from jaxinfer.train.draft.losses import DECAY, UNROLL, distillation, unrolled
from jaxinfer.train.draft.recipe import DraftRecipe
from jaxinfer.train.draft.student import new_student
from tests.factories import lm_of, random_tokens

forward = quick_jit(stack.forward)
TOKENS = random_tokens(3, 20, seed=5)
RECIPE = DraftRecipe(layers=1, width=32, windows=3, context=20)


def divergence(wanted: np.ndarray, given: np.ndarray) -> float:
    """KL(wanted || given) of two stacks of logits, the mean over positions."""
    wanted, given = (np.asarray(x, np.float64) for x in (wanted, given))
    return float(rel_entr(softmax(wanted, -1), softmax(given, -1)).sum(-1).mean())


def test_distillation_is_the_divergence_of_the_draft_from_the_target():
    target = lm_of()
    student = new_student(target, TOKENS, RECIPE)
    out = forward(target.config, target.params, jnp.asarray(TOKENS))
    head = {name: target.params[name] for name in ("embed", "head") if name in target.params}
    batch = {"tokens": jnp.asarray(TOKENS), "hidden": out.hidden, "head": head, "fixed": {}}
    loss, metrics = jax.jit(distillation(target.config, student.config))(
        student.trained, batch, jax.random.key(0)
    )
    given = forward(student.config, student.trained, jnp.asarray(TOKENS)).logits
    p, q = softmax(np.asarray(out.logits), -1), softmax(np.asarray(given), -1)
    np.testing.assert_allclose(loss, divergence(out.logits, given), rtol=1e-4)
    assert abs(divergence(out.logits, given) / divergence(given, out.logits) - 1) > 0.01
    np.testing.assert_allclose(metrics["overlap"], np.minimum(p, q).sum(-1).mean(), rtol=1e-4)


def test_a_recurrent_draft_learns_the_targets_choice_behind_what_it_has_read(monkeypatch):
    monkeypatch.setattr("jaxinfer.train.draft.losses.NO_STATE", 0.0)
    target = lm_of()
    student = new_student(target, TOKENS, replace(RECIPE, recurrent=True, width=None))
    tokens = jnp.asarray(TOKENS[:, : UNROLL + 2])  # one place to begin at, the first
    hidden = forward(target.config, target.params, tokens).hidden
    batch = {"tokens": tokens, "hidden": hidden, "head": {}, "fixed": student.fixed}
    loss, metrics = jax.jit(unrolled())(student.trained, batch, jax.random.key(0))

    params, head = student.params(student.trained), np.asarray(student.fixed["head"]["weight"])
    state, expected = hidden[:, :1], []
    for depth in range(UNROLL):
        # the state behind token 0 and the tokens from 1 on give what follows the last of them
        state = read(params, state, tokens[:, depth + 1 : depth + 2])
        wanted = np.asarray(hidden[:, depth + 1]) @ head.T
        expected.append(divergence(wanted, guesses(params, state)[:, 0]))
    weights = DECAY ** np.arange(UNROLL)
    np.testing.assert_allclose(loss, (weights * expected).sum() / weights.sum(), rtol=1e-4)
    first = log_softmax(np.asarray(hidden[:, 1]) @ head.T, -1)
    assert metrics["overlap"] == metrics["overlap_0"] and np.isfinite(first).all()
