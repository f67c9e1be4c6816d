"""Partial softmax states: merging any split equals one softmax over all keys (float64 oracle)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.nn.alibi import mpt_slopes
from jaxinfer.ops.attention import (
    NEGATIVE,
    AttentionSpec,
    Partial,
    empty_partial,
    finish,
    key_weights,
    log_sum_exp,
    merge,
    partial_attention,
)

B, K, G, T, H, J = 2, 2, 3, 5, 8, 24
SPEC = AttentionSpec(scale=H**-0.5)
SPECS = {
    "plain": SPEC,
    "softcap": replace(SPEC, softcap=1.5),
    "alibi": replace(SPEC, slopes=mpt_slopes(K * G)),
    "both": replace(SPEC, softcap=1.5, slopes=mpt_slopes(K * G)),
}
# float32 sums of 24 terms of size 1 against float64
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


class Problem:
    """Random queries at the last T of J positions, with a causal mask and some keys missing."""

    def __init__(self, seed: int = 0, scale: float = 1.0):
        rng = np.random.default_rng(seed)
        self.q = scale * rng.standard_normal((B, K, G, T, H)).astype(np.float32)
        self.k = rng.standard_normal((B, K, J, H)).astype(np.float32)
        self.v = rng.standard_normal((B, K, J, H)).astype(np.float32)
        distance = np.arange(J - T, J)[:, None] - np.arange(J)
        self.distance = np.broadcast_to(distance, (B, 1, T, J)).astype(np.int32)
        self.visible = (self.distance >= 0) & (rng.random((B, K, T, J)) < 0.8)
        self.visible[..., 0] = True

    def partial(self, spec, first=0, last=J, layout="BKSH") -> Partial:
        part = slice(first, last)
        k = self.k[:, :, part]
        k = k.transpose(0, 1, 3, 2) if layout == "BKHS" else k
        return partial_attention(
            spec,
            jnp.asarray(self.q),
            jnp.asarray(k),
            jnp.asarray(self.v[:, :, part]),
            jnp.asarray(self.distance[..., part]),
            jnp.asarray(self.visible[..., part]),
            layout,
        )

    def attn_weight(self, spec, lse, first=0, last=J):
        part = slice(first, last)
        return key_weights(
            spec,
            jnp.asarray(self.q),
            jnp.asarray(self.k[:, :, part]),
            jnp.asarray(self.distance[..., part]),
            jnp.asarray(self.visible[..., part]),
            lse,
        )

    def oracle(self, spec):
        """(output, probabilities) in float64, ALiBi as a bias by key position like Hugging Face."""
        s = np.einsum("bkgth,bkjh->bkgtj", self.q.astype(np.float64), self.k) * spec.scale
        if spec.softcap is not None:
            s = spec.softcap * np.tanh(s / spec.softcap)
        if spec.slopes is not None:
            bias = np.asarray(spec.slopes).reshape(K, G, 1, 1) * np.arange(1 - J, 1)
            s = s + bias
        s = np.where(self.visible[:, :, None], s, -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return np.einsum("bkgtj,bkjh->bkgth", p, self.v), p


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("layout", ["BKSH", "BKHS"])
def test_one_segment_equals_the_softmax(spec, layout):
    problem = Problem()
    np.testing.assert_allclose(
        finish(problem.partial(spec, layout=layout)), problem.oracle(spec)[0], **CLOSE
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("cuts", [(1,), (12, 13), (3, 9, 20)])
def test_segments_merged_in_any_order_equal_the_softmax(spec, cuts):
    problem = Problem()
    edges = [0, *cuts, J]
    parts = [problem.partial(spec, a, b) for a, b in zip(edges, edges[1:], strict=False)]
    expected = problem.oracle(spec)[0]
    for order in (parts, parts[::-1]):
        merged = empty_partial(jnp.asarray(problem.q))
        for part in order:
            merged = merge(merged, part)
        np.testing.assert_allclose(finish(merged), expected, **CLOSE)


def test_merge_is_associative():
    a, b, c = (Problem(seed, scale=3.0).partial(SPEC) for seed in range(3))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    np.testing.assert_array_equal(left.max, right.max)
    np.testing.assert_allclose(left.sum, right.sum, rtol=1e-6)
    np.testing.assert_allclose(left.acc, right.acc, rtol=1e-5, atol=1e-6)


def test_merge_with_the_empty_partial_changes_no_bit():
    some = Problem().partial(SPEC)
    none = empty_partial(jnp.zeros((B, K, G, T, H)))
    for merged in (merge(some, none), merge(none, some)):
        jax.tree.map(np.testing.assert_array_equal, merged, some)


def test_a_fully_masked_segment_is_the_empty_partial():
    problem = Problem()
    problem.visible[:] = False
    jax.tree.map(
        np.testing.assert_array_equal,
        problem.partial(SPEC),
        empty_partial(jnp.zeros((B, K, G, T, H))),
    )


def test_queries_that_see_nothing_give_zero_and_others_are_untouched():
    problem = Problem()
    expected = problem.oracle(SPEC)[0][:, :, :, 1:]
    problem.visible[:, :, 0] = False
    out = finish(problem.partial(SPEC))
    assert (out[:, :, :, 0] == 0).all()
    np.testing.assert_allclose(out[:, :, :, 1:], expected, **CLOSE)


def test_log_sum_exp_of_a_masked_query_is_finite():
    problem = Problem()
    problem.visible[:] = False
    lse = log_sum_exp(problem.partial(SPEC))
    assert np.isfinite(lse).all() and (lse <= NEGATIVE).all()
    assert np.isfinite(problem.attn_weight(SPEC, lse)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e18])
def test_extreme_scores_stay_exact_and_finite(scale):
    problem = Problem(scale=scale)
    np.testing.assert_allclose(finish(problem.partial(SPEC)), problem.oracle(SPEC)[0], **CLOSE)
    halves = merge(problem.partial(SPEC, 0, 11), problem.partial(SPEC, 11, J))
    np.testing.assert_allclose(finish(halves), problem.oracle(SPEC)[0], **CLOSE)


def test_segments_with_far_apart_peaks_do_not_overflow():
    near, far = Problem(), Problem(scale=1e4)
    merged = merge(near.partial(SPEC), far.partial(SPEC))
    assert all(np.isfinite(x).all() for x in merged)


def test_gradients_are_finite_when_a_hidden_key_scores_far_above_the_visible_ones():
    problem = Problem()
    problem.k[:, :, -1] *= 1e4
    problem.visible[..., -1] = False

    def loss(q):
        problem.q = q
        return jnp.sum(finish(problem.partial(SPEC)) ** 2)

    assert np.isfinite(jax.grad(loss)(jnp.asarray(problem.q))).all()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_attention_weight_is_the_probability_summed_over_the_group(spec):
    problem = Problem()
    lse = log_sum_exp(problem.partial(spec))
    expected = problem.oracle(spec)[1].sum(axis=2)
    np.testing.assert_allclose(problem.attn_weight(spec, lse), expected, **CLOSE)


def test_attention_weight_over_all_segments_sums_to_the_group_size():
    problem = Problem()
    lse = log_sum_exp(merge(problem.partial(SPEC, 0, 7), problem.partial(SPEC, 7, J)))
    parts = [problem.attn_weight(SPEC, lse, 0, 7), problem.attn_weight(SPEC, lse, 7, J)]
    total = sum(part.sum(axis=-1) for part in parts)
    np.testing.assert_allclose(total, np.full((B, K, T), G), rtol=1e-5)


def test_grouped_queries_equal_repeated_keys():
    problem = Problem()
    grouped = finish(problem.partial(SPEC)).reshape(B, K * G, 1, T, H)
    visible, distance = jnp.asarray(problem.visible), jnp.asarray(problem.distance)
    single = partial_attention(
        SPEC,
        jnp.asarray(problem.q).reshape(B, K * G, 1, T, H),
        jnp.repeat(jnp.asarray(problem.k), G, axis=1),
        jnp.repeat(jnp.asarray(problem.v), G, axis=1),
        distance,
        jnp.repeat(visible, G, axis=1),
    )
    np.testing.assert_allclose(grouped, finish(single), **CLOSE)


def test_a_distance_shift_of_every_key_leaves_alibi_unchanged():
    problem = Problem()
    before = finish(problem.partial(SPECS["alibi"]))
    problem.distance = problem.distance + 1000
    # scores near 500 keep 3e-5 of absolute precision in float32
    np.testing.assert_allclose(
        finish(problem.partial(SPECS["alibi"])), before, rtol=1e-3, atol=1e-4
    )


def test_bfloat16_keys_and_values_accumulate_in_float32():
    problem = Problem()
    exact = Problem()
    for name in ("q", "k", "v"):
        rounded = jnp.asarray(getattr(problem, name), jnp.bfloat16)
        setattr(problem, name, rounded)
        setattr(exact, name, np.asarray(rounded, np.float32))
    partial = partial_attention(
        SPEC,
        problem.q,
        problem.k,
        problem.v,
        jnp.asarray(problem.distance),
        jnp.asarray(problem.visible),
    )
    assert {x.dtype for x in partial} == {jnp.dtype("float32")}
    # only the probabilities are rounded to bfloat16: 2^-9 relative each
    np.testing.assert_allclose(finish(partial), exact.oracle(SPEC)[0], rtol=0, atol=1e-2)
