"""The schedule and the AdamW transform of the training scripts."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.train.optimizers import (
    adamw,
    decayed,
    muon,
    warmup_cosine,
    warmup_stable_decay,
)


def test_the_schedule_rises_to_its_peak_and_falls_to_a_tenth():
    schedule = warmup_cosine(1e-3, 100, warmup=10)
    rates = np.array([float(schedule(step)) for step in range(101)])
    assert rates[0] == 0 and np.argmax(rates) == 10
    np.testing.assert_allclose([rates[5], rates[10], rates[100]], [5e-4, 1e-3, 1e-4], rtol=1e-5)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup"):
        warmup_cosine(1e-3, 10, warmup=10)


def test_a_stable_schedule_is_independent_of_the_run_length_until_it_falls_to_zero():
    short = warmup_stable_decay(1e-3, 100, warmup=10, decay=0.2)
    long = warmup_stable_decay(1e-3, 900, warmup=10, decay=0.2)
    assert [float(short(s)) for s in range(80)] == [float(long(s)) for s in range(80)]
    np.testing.assert_allclose([short(5), short(79), short(90), short(100)], [5e-4, 1e-3, 5e-4, 0])


def test_norms_and_biases_do_not_decay():
    params = {
        "norm": {"scale": jnp.ones(4)},
        "q": {"weight": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    }
    assert decayed(params) == {"norm": {"scale": False}, "q": {"weight": True, "bias": False}}
    transform = adamw(0.1, weight_decay=0.5)
    zeros = {
        "norm": {"scale": jnp.zeros(4)},
        "q": {"weight": jnp.zeros((4, 4)), "bias": jnp.zeros(4)},
    }
    updates, _ = transform.update(zeros, transform.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(after["norm"]["scale"], 1.0)
    np.testing.assert_array_equal(after["q"]["bias"], 1.0)
    np.testing.assert_allclose(after["q"]["weight"], 0.95, rtol=1e-6)


def test_gradients_are_clipped_to_the_global_norm():
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    transform = adamw(1.0, weight_decay=0.0, clip=1.0, b1=0.0)
    big = {"a": jnp.full(3, 300.0), "b": jnp.full((2, 2), 400.0)}
    _, state = transform.update(big, transform.init(params), params)
    (moments,) = [s for s in _states(state) if isinstance(s, optax.ScaleByAdamState)]
    np.testing.assert_allclose(optax.tree.norm(moments.mu), 1.0, rtol=1e-5)


def test_muon_makes_kernel_updates_orthogonal_and_leaves_embeddings_to_adam():
    params = {"embed": {"tokens": jnp.zeros((8, 4))}, "q": {"weight": jnp.zeros((4, 4))}}
    grads = {
        "embed": {"tokens": jnp.ones((8, 4)).at[0].set(-5.0)},
        "q": {"weight": jnp.diag(jnp.array([1.0, 0.5, 0.2, 0.1]))},
    }
    transform = muon(1.0, clip=None)
    updates, _ = transform.update(grads, transform.init(params), params)
    scales = np.linalg.svd(updates["q"]["weight"], compute_uv=False)
    assert scales.min() > 0.5 * scales.max()  # Newton-Schulz brings all singular values near one
    # Adam's first step: one size for all entries, whatever the gradient's.
    sizes = np.abs(updates["embed"]["tokens"])
    np.testing.assert_allclose(sizes, sizes[0, 0], rtol=1e-5)


def _states(state):
    if isinstance(state, tuple):
        yield state
        for part in state:
            yield from _states(part)
