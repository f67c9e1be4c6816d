"""Dense attention and attention weight of keys: reference, interpret mode, CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops.attention import (
    AttentionSpec,
    Partial,
    finish,
    log_sum_exp,
    merge,
    partial_attention,
)
from pallas_kernels.dense_attention import dense_attention, key_weights
from pallas_kernels.dense_attention.configs import Config
from pallas_kernels.softmax_state import ExtraKeys
from tests.kernels.checking import NEGATIVE, agree, compiles_without_spills, lowers_for_cuda


def problem(seed: int):
    """Random shapes and arguments: ragged, grouped, odd sizes, rows that see nothing."""
    rng = np.random.default_rng(seed)
    b, k, g, t = (int(rng.integers(1, high)) for high in (4, 4, 5, 7))
    s, h = int(rng.integers(1, 150)), int(rng.choice([8, 24, 64, 80, 128]))
    dtype = rng.choice(["float32", "bfloat16"])

    def some(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def maybe(n):
        return int(rng.choice([1, n]))

    q, keys, values = some(b, k, g, t, h), some(b, k, s, h), some(b, k, s, h)
    visible = jnp.asarray(rng.random((maybe(b), maybe(k), maybe(t), s)) < rng.choice([0.0, 0.5, 1]))
    stop = jnp.asarray(rng.integers(0, s + 1, b), jnp.int32)
    spec = {"scale": float(rng.uniform(0.05, 0.5)), "softcap": rng.choice([None, 5.0])}
    distance = None
    if rng.random() < 0.5:
        distance = jnp.asarray(rng.integers(0, 60, (b, 1, t, s)), jnp.int32)
        spec["slopes"] = tuple(rng.uniform(0.01, 0.3, k * g).tolist())
    config = rng.choice([None, Config(rows=16, keys=16, splits=3)])
    lse = jnp.asarray(rng.normal(size=(b, k, g, t)) + 3, jnp.float32)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    return q, keys, values, visible, distance, stop, lse, spec | {"config": config}, tolerance


QUICK, ALL = range(3), [pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_the_kernels_agree_with_their_references(seed):
    q, k, v, visible, distance, stop, lse, options, tolerance = problem(seed)
    agree(
        functools.partial(dense_attention, **options), q, k, v, visible, distance, stop,
        tolerance=tolerance,
    )  # fmt: skip
    agree(
        functools.partial(key_weights, **options), q, k, visible, lse, distance, stop,
        tolerance=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_given_the_rest_of_the_keys_it_attends_to_all(seed):
    q, k, v, visible, distance, stop, _, options, tolerance = problem(seed)
    rng = np.random.default_rng(seed)
    fresh = int(rng.integers(1, 6))
    hidden = rng.random((*q.shape[:-1], fresh)) < rng.choice([0.0, 0.5])
    scores = jnp.asarray(np.where(hidden, NEGATIVE, 3 * rng.normal(size=hidden.shape)), jnp.float32)
    values = jnp.asarray(rng.normal(size=(*q.shape[:2], fresh, q.shape[-1])), q.dtype)
    run = functools.partial(dense_attention, **options)
    other = run(-q, v, k, visible, distance, stop, implementation="reference")
    extra = ExtraKeys(scores, values, other if seed % 2 else None)
    agree(run, q, k, v, visible, distance, stop, extra, tolerance=tolerance)

    states = [run(q, k, v, visible, distance, stop, implementation="reference")]
    states += [other] if seed % 2 else []
    merged = functools.reduce(merge, (Partial(*state) for state in states))
    seen = jnp.exp(scores - merged.max[..., None]) * ~hidden
    acc = merged.acc + jnp.einsum("bkgtj,bkjh->bkgth", seen, values.astype(jnp.float32))
    expected = finish(merged._replace(acc=acc, sum=merged.sum + seen.sum(axis=-1)))
    found = run(q, k, v, visible, distance, stop, extra, implementation="reference")
    some = merged.max > NEGATIVE  # else its scores are no measure of the fresh ones
    np.testing.assert_allclose(
        np.asarray(found, np.float32)[some], np.asarray(expected)[some], atol=tolerance * 5
    )


def test_the_reference_is_the_attention_of_the_library():
    q, k, v, visible, distance, _, _, options, _ = problem(4)
    options.pop("config")
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    found = Partial(*dense_attention(q, k, v, visible, distance, **options))
    shape = (q.shape[0], 1, q.shape[3], k.shape[2])
    distance_or_zero = jnp.zeros(shape, jnp.int32) if distance is None else distance
    expected = partial_attention(AttentionSpec(**options), q, k, v, distance_or_zero, visible)
    np.testing.assert_allclose(finish(found), finish(expected), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_sum_exp(found), log_sum_exp(expected), rtol=1e-5)


def test_slots_behind_stop_are_not_read():
    q, k, v, visible, *_ = problem(0)
    stop = jnp.full(q.shape[0], k.shape[2] // 2, jnp.int32)
    poisoned = [x.at[:, :, k.shape[2] // 2 :].set(jnp.nan) for x in (k, v)]
    for implementation in ("reference", "interpret"):
        run = functools.partial(dense_attention, scale=0.1, implementation=implementation)
        clean, found = run(q, k, v, visible, None, stop), run(q, *poisoned, visible, None, stop)
        jax.tree.map(np.testing.assert_array_equal, clean, found)


SHAPES = [
    pytest.param(8, 8, 4, 1, 128, "bfloat16", id="llama-3"),
    pytest.param(1, 32, 1, 1, 128, "bfloat16", id="llama-2"),
    pytest.param(1, 3, 3, 64, 64, "bfloat16", id="tree of 64"),
    pytest.param(2, 4, 2, 1, 80, "float32", id="float32 of odd size"),
]


def shapes(b, k, g, t, h, dtype, slots):
    def array(*shape, of=dtype):
        return jax.ShapeDtypeStruct(shape, of)

    cache = array(b, k, slots, h)
    return (
        array(b, k, g, t, h),
        cache,
        cache,
        array(b, 1, t, slots, of="bool"),
        array(b, of="int32"),
    )


@pytest.mark.parametrize("b, k, g, t, h, dtype", SHAPES)
def test_it_compiles_for_an_h200_without_spills(b, k, g, t, h, dtype):
    q, keys, values, visible, stop = shapes(b, k, g, t, h, dtype, 8192)

    def run(q, k, v, visible, stop):
        acc, top, total = dense_attention(q, k, v, visible, None, stop, scale=0.1)
        attn_weight = key_weights(q, k, visible, top + jnp.log(total), None, stop, scale=0.1)
        return acc, attn_weight

    lowers_for_cuda(run, q, keys, values, visible, stop, calls=3)  # one merges the splits
    compiles_without_spills(run, q, keys, values, visible, stop)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"visible": (2, 2, 1, 30)}, r"visible must have shape \[2\|1, 2\|1, 3\|1, 40\]"),
        ({"k": (2, 3, 40, 16)}, r"k must have shape \[2, 2, _, 16\], got \[2, 3, 40, 16\]"),
        ({"stop": (1,)}, r"stop must have shape \[2\], got \[1\]"),
        ({"slopes": (0.1,)}, "ALiBi needs `distance` and 4 slopes"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given = {"q": (2, 2, 2, 3, 16), "k": (2, 2, 40, 16), "v": (2, 2, 40, 16)}
    given |= {"visible": (1, 1, 1, 40), "stop": (2,)}
    arrays = {name: jnp.zeros(change.get(name, shape)) for name, shape in given.items()}
    arrays |= {"visible": arrays["visible"] > 0, "stop": arrays["stop"].astype(jnp.int32)}
    more = {name: x for name, x in change.items() if name not in given}
    with pytest.raises(ValueError, match=message):
        dense_attention(**arrays, scale=0.1, **more)
