"""Long convolutions by FFT, by Toeplitz matrices and along a tree are one sum, each computed in
NumPy token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops.long_convolution import (
    Seen,
    causal_convolution,
    fft_convolution,
    fft_outer,
    outer_convolution,
    seen_convolution,
    seen_outer,
    toeplitz_convolution,
)
from jaxinfer.testing.quick import QUICK

jit = functools.partial(jax.jit, compiler_options=QUICK)
SIZE, CHANNELS, HEAD = 150, 6, 3
fft, toeplitz = jit(fft_convolution), jit(toeplitz_convolution, static_argnums=2)
causal = jit(causal_convolution, static_argnums=2)
fft_heads, heads = jit(fft_outer), jit(outer_convolution)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def summed(u: np.ndarray, h: np.ndarray) -> np.ndarray:
    """In float64; a filter shorter than the text ends there."""
    y = np.zeros(u.shape)
    for t in range(u.shape[1]):
        for s in range(max(0, t - h.shape[1] + 1), t + 1):
            y[:, t] += h[:, t - s].astype(np.float64) * u[:, s]
    return y


def contracted(q: np.ndarray, k: np.ndarray, v: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Linear attention with a Toeplitz mask, in float64."""
    q, k, v = (x.reshape(*x.shape[:2], len(h), -1).astype(np.float64) for x in (q, k, v))
    scores = np.einsum("btfn,bsfn->fbts", q, k)
    lag = np.subtract.outer(np.arange(q.shape[1]), np.arange(q.shape[1]))
    mask = np.where(lag >= 0, h[:, np.maximum(lag, 0)], 0)
    return np.einsum("fbts,bsfn->btfn", scores * mask[:, None], v).reshape(*q.shape[:2], -1)


@pytest.mark.parametrize("length", [40, 200])
def test_fft_and_toeplitz_are_the_sum(length):
    u, h = drawn(2, SIZE, CHANNELS), drawn(CHANNELS, length, seed=1)
    expected = summed(u, h)
    for found in (fft(u, h), toeplitz(u, h, 64), toeplitz(u, h, 37), causal(u, h)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    few = causal(u[:, :20], h, 5)
    np.testing.assert_allclose(few, expected[:, 15:20], atol=1e-5 * np.abs(expected).max())


def test_sums_are_float32_in_a_model_of_bfloat16():
    """laughing_hyena.md 4.3: an FFT takes no bfloat16."""
    u, h = jnp.asarray(drawn(1, SIZE, CHANNELS), jnp.bfloat16), drawn(CHANNELS, SIZE, seed=1)
    expected = summed(np.asarray(u, np.float32), h)
    for found in (fft(u, h), causal(u[:, :9], h)):
        assert found.dtype == jnp.float32
        part = expected[:, : found.shape[1]]
        np.testing.assert_allclose(found, part, atol=1e-5 * np.abs(expected).max())


def test_the_key_index_of_the_outer_product_is_summed():
    """laughing_hyena.md 5.3: three forms are one, and the elementwise product, as a published port
    has it, is another by more than half its norm."""
    q, k, v = (drawn(2, SIZE, CHANNELS, seed=seed) for seed in range(3))
    h = drawn(CHANNELS // HEAD, SIZE, seed=3) * 0.99 ** np.arange(SIZE, dtype=np.float32)
    expected = contracted(q, k, v, h)
    size = np.abs(expected).max()
    np.testing.assert_allclose(fft_heads(q, k, v, h), expected, atol=1e-5 * size)
    last = fft_heads(q[:, -7:], k, v, h)
    np.testing.assert_allclose(last, expected[:, -7:], atol=1e-5 * size)
    few = heads(q[:, :30], k[:, :30], v[:, :30], h)
    np.testing.assert_allclose(few, expected[:, :30], atol=1e-5 * size)
    outer = k.reshape(2, SIZE, -1, HEAD, 1) * v.reshape(2, SIZE, -1, 1, HEAD)
    flat = fft(outer.reshape(2, SIZE, -1), np.repeat(h, HEAD**2, axis=0))
    convolved = np.asarray(flat).reshape(outer.shape)
    queries = q.reshape(2, SIZE, -1, HEAD)
    right = np.einsum("btfi,btfij->btfj", queries, convolved).reshape(q.shape)
    wrong = np.einsum("btfi,btfji->btfj", queries, convolved).reshape(q.shape)
    np.testing.assert_allclose(right, expected, atol=1e-5 * size)
    assert np.linalg.norm(wrong - expected) > 0.5 * np.linalg.norm(expected)


def test_a_tree_is_a_text_along_every_path():
    parent = [-1, 0, 1, 1, 0, 4]
    depth, visible = np.zeros(6, int), np.eye(6, dtype=bool)
    for node, above in enumerate(parent):
        if above >= 0:
            depth[node] = depth[above] + 1
            visible[node] |= visible[above]
    seen = Seen((depth[:, None] - depth)[None], visible[None])
    u, k, v = (drawn(2, 6, CHANNELS, seed=seed) for seed in range(3))
    h, per_head = drawn(CHANNELS, 9, seed=4), drawn(CHANNELS // HEAD, 9, seed=5)
    found, outer = (
        jit(seen_convolution)(u, h, seen),
        jit(seen_outer)(u, k, v, per_head, seen),
    )
    for node in range(6):
        path = np.flatnonzero(visible[node])
        expected = summed(u[:, path], h)[:, -1]
        np.testing.assert_allclose(found[:, node], expected, atol=1e-5)
        expected = contracted(u[:, path], k[:, path], v[:, path], per_head)[:, -1]
        np.testing.assert_allclose(outer[:, node], expected, atol=1e-5)
