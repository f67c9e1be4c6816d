"""Identities of long convolutions and recurrences in float64: run as a script, since x64 is set per
process.

    JAX_ENABLE_X64=1 python -m tests.models.hyena_float64

One line per check of laughing_hyena.md 5.3 and 5.4; it exits with an error where one fails.
"""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import full
from jaxinfer.cache.context import CommitContext, StepContext, chain_context
from jaxinfer.hyena_config import FilterConfig, HyenaConfig
from jaxinfer.models.hyena import Hyena
from jaxinfer.models.hyena_ahead import from_ahead
from jaxinfer.models.hyena_state import (
    HyenaFresh,
    HyenaPolicy,
    HyenaState,
    committed,
    empty_state,
)
from jaxinfer.models.stack import cache_geometry
from jaxinfer.nn.modal import check_stable, impulse_response, modal_filter, powers
from jaxinfer.ops.long_convolution import Seen, fft_convolution, fft_outer, seen_outer
from jaxinfer.speculative.step import tree_context
from jaxinfer.speculative.topology import Topology
from jaxinfer.testing.quick import QUICK
from tests.models.hyena_models import CONFIGS, MODES, params_of

TREE = Topology.from_children([[[]], [[], []], []])  # 7 nodes
RNG = np.random.default_rng(0)
jit = functools.partial(jax.jit, compiler_options=QUICK)
wide = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))


def some_modes(filters: int, modes: int, radius: tuple[float, float]):
    poles = RNG.uniform(*radius, (filters, modes))
    poles = poles * np.exp(1j * RNG.uniform(-np.pi, np.pi, poles.shape))
    residues = RNG.standard_normal(poles.shape) + 1j * RNG.standard_normal(poles.shape)
    return modal_filter(poles, residues / modes, RNG.standard_normal(filters))


def recurrence(f, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [T, F, ...] and the last state of inputs [T, F, ...], in complex128."""
    more = (..., *(None,) * (u.ndim - 2))
    poles, residues = (np.moveaxis(x, 1, 0)[more] for x in (f.poles(), f.residues()))
    state, found = np.zeros((f.modes, *u.shape[1:]), complex), []
    h0 = np.asarray(f.h0, np.float64)[more]
    for now in u:
        found.append(h0 * now + (residues * state).real.sum(axis=0))
        state = poles * state + now
    return np.stack(found), state


def close(found, expected, most: float) -> float:
    error = float(np.abs(np.asarray(found) - expected).max())
    assert error < most, (error, most)
    return error


def check_a_convolution_is_its_recurrence():
    f, u = some_modes(3, 8, (0.9, 0.99)), RNG.standard_normal((1024, 3))
    expected, _ = recurrence(f, u)
    h = jit(impulse_response, static_argnums=1)(wide(f), 1024)
    first = close(jit(fft_convolution)(jnp.asarray(u)[None], h)[0], expected, 1e-11)
    h = jit(impulse_response, static_argnums=1)(f, 1024)
    assert h.dtype == jnp.float32
    found = jit(fft_convolution)(jnp.asarray(u, jnp.float32)[None], h)[0]
    return first, close(found, expected, 1e-5 * np.abs(expected).max())


def check_multihyena_is_a_recurrence_and_masked_attention():
    f, n = some_modes(2, 8, (0.9, 0.99)), 4
    q, k, v = RNG.standard_normal((3, 256, 2, n))
    outer, _ = recurrence(f, k[..., None] * v[..., None, :])
    expected = np.einsum("tfi,tfij->tfj", q, outer).reshape(1, 256, -1)
    h = jit(impulse_response, static_argnums=1)(wide(f), 256)
    q, k, v = (jnp.asarray(x).reshape(1, 256, -1) for x in (q, k, v))
    return (
        close(jit(fft_outer)(q, k, v, h), expected, 1e-11),
        close(jit(seen_outer)(q, k, v, h, Seen.chain(256, 256)), expected, 1e-11),
    )


def check_the_state_behind_a_prompt():
    """In rows of unequal length; in float32 chunks of 128 to 1e-6 of the largest, other ways to
    5e-5. A token behind a prompt is a prompt of one more."""
    f, u = some_modes(MODES.hidden_size, 4, (0.9, 0.999)), RNG.standard_normal((2, 300, 32))
    ways = "chunked", "scan", "recurrence", "vandermonde", "fft"
    for dtype, way in itertools.product((jnp.float64, jnp.float32), ways):
        most = 1e-12 if dtype == jnp.float64 else 1e-6 if way == "chunked" else 5e-5
        cfg = replace(MODES, hyena=replace(MODES.hyena, prefill=way))
        params = {"filter": {name: jnp.asarray(getattr(f, name), dtype) for name in
                             ("nu", "theta", "a", "b", "h0")}}  # fmt: skip
        zeros = jnp.zeros((2, 32, 1, 4), dtype)
        p = jnp.zeros((2, 300, 96), dtype)
        state = HyenaState(short=p[:, :2], re=zeros, im=zeros)
        inputs = jnp.asarray(u, dtype)
        fresh = HyenaFresh(p=p, inputs=inputs, depth=jnp.zeros((2, 300), jnp.int32))
        count = jnp.asarray([300, 131], jnp.int32)
        ctx = CommitContext(length=count, accepted=None, count=count, after=count)
        push = jit(committed, static_argnums=0)
        found = push(cfg, params, state, fresh, ctx)
        for row, size in enumerate((300, 131)):
            _, expected = recurrence(f, np.asarray(inputs[row, :size], np.float64))
            error = found.re[row, :, 0].T + 1j * found.im[row, :, 0].T - expected
            relative = float(np.abs(error).max() / np.abs(expected).max())
            assert relative < most, (way, dtype, relative)
        shorter = CommitContext(length=count, accepted=None, count=count - 1, after=count)
        before = push(cfg, params, state, fresh, shorter)
        last = HyenaFresh(p=p[:, :1], inputs=jnp.stack([inputs[:1, 299], inputs[1:, 130]]),
                          depth=jnp.zeros((2, 1), jnp.int32))  # fmt: skip
        after = push(cfg, params, before, last, replace(ctx, count=count // count))
        scale = float(np.abs(found.re).max())
        close(after.re, np.asarray(found.re), (most if dtype == jnp.float64 else 1e-5) * scale)
    return ()


def check_sums_ahead_are_direct():
    """1,024 tokens behind a prompt of 21, in float64 to 1e-12 and in float32 to 1e-5."""
    filters, size, found = FilterConfig(kind="explicit"), 1024, []
    u = RNG.standard_normal((1, size + 21, 32))
    h = RNG.standard_normal((32, size + 64)) * 0.995 ** np.arange(size + 64)
    direct = np.stack([np.convolve(u[0, :, c], h[c])[21 : size + 21] for c in range(32)], axis=1)
    for form, dtype in itertools.product(("tiled", "epoched"), (jnp.float64, jnp.float32)):
        cfg = replace(MODES, max_positions=size + 64, hyena=HyenaConfig(filter=filters, exact=form))
        params = {"filter": {"h": jnp.asarray(h, dtype)}, "skip": jnp.zeros(32, dtype)}
        policy = HyenaPolicy.of(cfg, params)
        state = jax.tree.map(
            lambda x, dtype=dtype: x.astype(dtype) if x.dtype != jnp.int32 else x,
            empty_state(cfg, policy, cache_geometry(cfg, size + 64), 1),
        )

        def pushed(state, u, length, cfg=cfg, params=params, policy=policy):
            count = jnp.full(1, u.shape[1], jnp.int32)
            ctx = CommitContext(length=length, accepted=None, count=count, after=length)
            p = jnp.zeros((1, u.shape[1], 96), u.dtype)
            fresh = HyenaFresh(p=p, inputs=u, depth=jnp.zeros(u.shape[:2], jnp.int32))
            return Hyena().commit(cfg, policy, params, state, fresh, ctx)

        @jit
        def run(state, u, cfg=cfg, params=params, policy=policy, pushed=pushed):
            def step(carry, u):
                state, length = carry
                y = from_ahead(cfg, policy, params, state, length, 0, u[:, None])
                y = y[:, 0] + params["filter"]["h"][:, 0] * u
                return (pushed(state, u[:, None], length), length + 1), y[0]

            state = pushed(state, u[:, :21], jnp.zeros(1, jnp.int32))
            return jax.lax.scan(step, (state, jnp.full(1, 21, jnp.int32)), u[:, 21:].swapaxes(0, 1))

        _, y = run(state, jnp.asarray(u, dtype))
        most = 1e-12 if dtype == jnp.float64 else 1e-5
        found.append(close(y, direct, most * np.abs(direct).max()))
    return tuple(found)


def check_a_tree_is_each_of_its_paths():
    """Outputs and the state behind an accepted path: heads by modes, order 3 behind taps."""
    mixer, found = Hyena(), []
    for name, layer in (("multi", 0), ("third", 0)):
        cfg = CONFIGS[name]
        params = wide(params_of(cfg)["layers"][layer]["hyena"])
        policy = mixer.policy(cfg, params, full())
        state = wide(mixer.init(cfg, policy, cache_geometry(cfg, 32), 1))
        read = jit(
            lambda state, x, ctx, cfg=cfg, params=params, policy=policy: mixer.read(
                cfg, policy, params, state, x, ctx, None, 0
            )
        )
        push = jit(
            lambda state, fresh, ctx, cfg=cfg, params=params, policy=policy: mixer.commit(
                cfg, policy, params, state, fresh, ctx
            )
        )

        def on(state, x, length, read=read, push=push):
            one, length = jnp.asarray([1], jnp.int32), jnp.asarray([length], jnp.int32)
            y, fresh = read(state, x, chain_context(length, one, 1))
            ctx = CommitContext(length=length, accepted=None, count=one, after=one)
            return y, push(state, fresh, ctx)

        text, nodes = (jnp.asarray(RNG.standard_normal((1, n, 32))) for n in (5, TREE.nodes))
        for i in range(5):
            _, state = on(state, text[:, i : i + 1], i)
        length = jnp.asarray([5], jnp.int32)
        ctx: StepContext = tree_context(TREE, length)
        y, fresh = read(state, nodes, ctx)
        assert y.dtype == jnp.float64
        for node in range(TREE.nodes):
            path, after = np.flatnonzero(TREE.ancestors[node]), state
            for depth, i in enumerate(path):
                expected, after = on(after, nodes[:, i : i + 1], 5 + depth)
            found.append(close(y[:, node], np.asarray(expected[:, 0]), 1e-12))
            accepted = jnp.asarray([[*path, *[0] * (TREE.levels - len(path))]], jnp.int32)
            count = jnp.asarray([len(path)], jnp.int32)
            ended = push(state, fresh, CommitContext(
                length=length, accepted=accepted, count=count, after=count))  # fmt: skip
            jax.tree.map(lambda x, y: found.append(close(x, np.asarray(y), 1e-12)), ended, after)
    return (max(found),)


def check_a_long_decode_in_float32_keeps_its_state():
    """Poles at 1 - 1e-5: 32,000 steps to 2e-5, and a million without input stay finite."""
    f = some_modes(2, 3, (1 - 1e-5, 1 - 1e-5))
    (re,), (im,) = (jnp.moveaxis(x, -1, 0) for x in powers(f.nu, f.theta, jnp.arange(1, 2)))
    pole = np.asarray(re, np.float64) + 1j * np.asarray(im, np.float64)  # as steps have it
    u = RNG.standard_normal((32000, 2)).astype(np.float32)

    @jax.jit
    def run(start, inputs):
        def step(state, u):
            x, y = state
            return (re * x - im * y + u[:, None], im * x + re * y), None

        return jax.lax.scan(step, start, inputs)[0]

    zeros = jnp.zeros((2, 3), jnp.float32)
    found = run((zeros, zeros), u)
    state = np.zeros((2, 3), complex)
    for now in u.astype(np.float64):
        state = pole * state + now[:, None]
    error = np.abs(np.asarray(found[0]) + 1j * np.asarray(found[1]) - state).max()
    relative = float(error / np.abs(state).max())
    assert relative < 2e-5, relative
    rest = run(found, jnp.zeros((1_000_000, 2), jnp.float32))
    assert all(np.isfinite(x).all() for x in rest)
    return (relative,)


def check_poles_in_bfloat16_are_found_out():
    poles = 0.999 * np.exp(1j * RNG.uniform(-np.pi, np.pi, (64, 8)))
    rounded = [
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (poles.real, poles.imag)
    ]
    try:
        check_stable(np.abs(rounded[0] + 1j * rounded[1]), "rounded poles")
    except ValueError as error:
        assert "not inside the unit circle" in str(error)
    else:
        raise AssertionError("no pole left the circle")
    return ()


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("check_") and name != "check_stable":
            print("passed", name, *(f"{error:.1e}" for error in check()))
