"""Algebra that must hold to 1e-12, in float64: run as a script, since x64 is set per process.

    JAX_ENABLE_X64=1 python -m tests.float64_checks

`tests/test_float64.py` runs it and reports what it printed, one line per check.
"""

import functools
import itertools
import sys
import traceback
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.context import PushContext
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.config import RopeConfig
from jaxinfer.nn.alibi import mpt_slopes
from jaxinfer.nn.feature_map import FeatureMaps
from jaxinfer.nn.rope import rotate, rotation
from jaxinfer.ops.attention import (
    AttentionSpec,
    empty_partial,
    finish,
    merge,
    partial_attention,
    sink_partial,
)

B, K, G, T, H, J = 2, 2, 3, 4, 8, 24
SPEC = AttentionSpec(scale=H**-0.5)
SPECS = {
    "plain": SPEC,
    "softcap": replace(SPEC, softcap=1.5),
    "alibi": replace(SPEC, slopes=mpt_slopes(K * G)),
}
RANK = 3
DISTANCE = np.broadcast_to(np.arange(J - T, J)[:, None] - np.arange(J), (B, 1, T, J))
# Compiled: thousands of single operations would take a minute.
read = jax.jit(partial_attention, static_argnums=0)
join = jax.jit(merge)
push = jax.jit(LowRank.push, static_argnums=0)


def features_of(which: str, maps, x):
    """phi of queries or psi of keys."""
    return FeatureMaps.of_params(maps).apply({"params": maps}, x, method=which)


def same(found, expected) -> None:
    """Equal to 1e-12 of the largest entry, and computed in float64."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == np.float64, found.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def weights(s: np.ndarray) -> np.ndarray:
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def qkv() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((B, K, G, T, H), (B, K, J, H), (B, K, J, H))
    return [
        rng.standard_normal(shape) * size for shape, size in zip(shapes, (3, 1, 1), strict=True)
    ]


def attended(spec: AttentionSpec, q, k, v, visible):
    return read(spec, *map(jnp.asarray, (q, k, v, DISTANCE, visible)))


def check_any_split_of_the_keys_merges_to_one_softmax() -> None:
    q, k, v = qkv()
    rng = np.random.default_rng(0)
    # Which part a key belongs to: one part, two, a few, each key alone.
    splits = [rng.integers(0, parts, J) for parts in (1, 2, 5)] + [rng.permutation(J)]
    visible = DISTANCE >= 0
    sink = np.linspace(-1, 1, K * G)
    for spec in SPECS.values():
        s = np.einsum("bkgth,bkjh->bkgtj", q, k) * spec.scale
        if spec.softcap:
            s = spec.softcap * np.tanh(s / spec.softcap)
        if spec.slopes:
            s = s - np.reshape(spec.slopes, (K, G, 1, 1)) * DISTANCE[:, :, None]
        s = np.where(visible[:, :, None], s, -np.inf)
        logit = np.broadcast_to(sink.reshape(K, G, 1, 1), (*s.shape[:-1], 1))
        with_sink = weights(np.concatenate([s, logit], axis=-1))[..., :-1]
        starts = [
            (empty_partial(jnp.asarray(q)), weights(s)),
            (sink_partial(jnp.asarray(q), jnp.asarray(sink)), with_sink),
        ]
        for split in splits:
            parts = [attended(spec, q, k, v, visible & (split == i)) for i in np.unique(split)]
            for start, p in starts:
                for order in (parts, parts[::-1]):
                    merged = functools.reduce(join, order, start)
                    same(finish(merged), np.einsum("bkgtj,bkjh->bkgth", p, v))


def check_a_rotated_product_sees_the_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(x) for x in rng.standard_normal((2, 1, 1, 1, 16)))
    # A float32 frequency times a position below 2^29 is exact in float64; turns counted in integers
    # wrap, and are exact at every position.
    far = {False: (1, 1000, 100_000_000), True: (1, 4_000_000, 100_000_000, 2**31 - 100)}
    ropes = (RopeConfig(rotary_dim=16), RopeConfig(rotary_dim=6, theta=500.0))
    for rope, (exact, shifts) in itertools.product(ropes, far.items()):

        @jax.jit
        def score(i: int, j: int, rope=rope, exact=exact):
            at = [
                rotation(rope, jnp.full((1, 1), p, jnp.int32), exact=exact, dtype=jnp.float64)
                for p in (i, j)
            ]
            return (rotate(q, at[0]) * rotate(k, at[1])).sum(axis=-1)

        for distance, shift in itertools.product((0, 5, 50), shifts):
            same(score(shift + distance, shift), score(distance, 0))


def check_less_absorbs_to_the_explicit_sum_in_any_order() -> None:
    q, k, v = (jnp.asarray(x) for x in qkv())
    maps = FeatureMaps(K * G, K, H, 16, RANK)
    heads_q = q.reshape(B, K * G, T, H)
    shapes = jax.eval_shape(maps.init, jax.random.key(0), heads_q, k)["params"]
    rng = np.random.default_rng(1)
    made = {name: jnp.asarray(rng.normal(0, 0.5, x.shape)) for name, x in shapes.items()}
    aux = {"feature_map": made}
    gone, tier = J - 6, LowRank(rank=RANK)
    geometry = Geometry(num_kv_heads=K, head_dim=H, capacity=J, dtype="float64")

    @jax.jit
    def attend(state):
        (segment,) = tier.segments(state, aux, jnp.zeros((B,), jnp.int32))
        partial = segment.partial(SPEC, q, jnp.zeros((B, T), jnp.int32), None)
        return finish(merge(kept, partial))

    def absorbed(order: np.ndarray, cuts: tuple[int, ...]):
        state = tier.init(geometry, B)
        for first, last in itertools.pairwise([0, *cuts, gone]):
            taken = np.roll(order, -first)  # what lies behind `count` must not enter
            items = Items(k=k[:, :, taken], v=v[:, :, taken], pos=jnp.asarray(taken)[None, None])
            count = jnp.full((B,), last - first, jnp.int32)
            ctx = PushContext(n_in=count, count=count, after=count, length=count)
            state, _, _ = push(tier, state, aux, items, ctx)
        return state

    features = jax.jit(features_of, static_argnums=0)
    phi, psi = (np.asarray(features(*x)) for x in (("query", made, heads_q), ("key", made, k)))
    kept = attended(SPEC, q, k, v, np.broadcast_to(np.arange(J) >= gone, DISTANCE.shape))
    dense = np.exp(np.einsum("bkgth,bkjh->bkgtj", q, k[:, :, gone:]) * SPEC.scale)
    low = np.einsum("bkgtr,bkjr->bkgtj", phi.reshape(B, K, G, T, RANK), psi[:, :, :gone])
    p = np.concatenate([low, dense], axis=-1)  # equation 3 of the paper
    expected = np.einsum("bkgtj,bkjh->bkgth", p / p.sum(axis=-1, keepdims=True), v)
    assert 0.05 < (low.sum(axis=-1) / p.sum(axis=-1)).mean() < 0.95  # both kinds have their say
    for cuts in ((), (1,), (5, 11), tuple(range(1, gone))):
        for order in (np.arange(gone), np.arange(gone)[::-1], rng.permutation(gone)):
            state = absorbed(order, cuts)
            same(state.den, psi[:, :, :gone].sum(axis=2))
            same(state.num, np.einsum("bkar,bkah->bkrh", psi[:, :, :gone], v[:, :, :gone]))
            same(attend(state), expected)


def main() -> int:
    checks = {name: f for name, f in globals().items() if name.startswith("check_")}
    failed = 0
    for name, check in checks.items():
        try:
            check()
        except Exception:
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc()}")
        else:
            print(f"passed {name}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
