"""The small kernels between products: the flush of a quantized cache, the writes to any other, a
modal recurrence, LESS's state, a residual sum with its norm.

Bytes are those of the kernels' documentation: tokens are read and they or their codes written; the
LESS kernels move the state and the weights of the feature maps; the recurrence its state and
coefficients; a norm reads two arrays and writes two.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bench.gpu.correctness_part import stored
from bench.gpu.rows import Run
from bench.gpu.timing import Timed, filled
from pallas_kernels.add_norm import add_norm
from pallas_kernels.kivi_push import kivi_push
from pallas_kernels.less_state import low_rank_read, low_rank_update
from pallas_kernels.modal_step import hyena_step, modal_step
from pallas_kernels.put_tokens import put_tokens
from pallas_kernels.quantize_pack import quantize_pack

KV = ((0, "k"), (1, "v"))


def steps(run: Run) -> list[Timed]:
    complete = functools.partial(push, completes=True)
    makers: tuple[Callable[[Run, str], Timed], ...] = (
        flush, push, complete, put, read, update, modal, norm,
    )  # fmt: skip
    return [make(run, peer) for make in makers for peer in ("kernel", "reference")]


def flush(
    run: Run, peer: str, config: Any = None, bits: int = 2, group: int = 32, is_key: bool = True
) -> Timed:
    b, k, tokens, h, room = (2, 2, 32, 64, 256) if run.quick else (64, 8, 128, 128, 4096)

    def inputs(seed: Any) -> tuple[Any, tuple]:
        half = stored((b, k, room, h), bits, group, seed=seed)[0 if is_key else 1]
        index = jnp.full((b, 1), 1, jnp.int32) + (seed % 2).astype(jnp.int32)
        return half, (index, filled(seed + 9, (b, k, tokens, h), jnp.bfloat16))

    def call(half: Any, index: Any, x: Any) -> tuple[Any, Any]:
        new = quantize_pack(
            half, x, index, bits=bits, per_channel=is_key, config=config,
            implementation=_name(run, peer),
        )  # fmt: skip
        return new, new.zero[0, 0, 0, :1]

    size = b * k * tokens * h * (2 + bits / 8 + 4 / group)
    form = {"op": f"quantize_pack {bits} bits", "shape": [b, k, tokens, h]}
    return _timed(run, form, peer, inputs, call, size)


def put(run: Run, peer: str, config: Any = None, tokens: int = 1) -> Timed:
    b, k, h, slots = (2, 2, 64, 4096) if run.quick else (8, 32, 128, 4096)

    def inputs(seed: Any) -> tuple[Any, tuple]:
        cache = {name: filled(seed + i, (b, k, slots, h), jnp.bfloat16) for i, name in KV}
        fresh = {name: filled(seed + 2 + i, (b, k, tokens, h), jnp.bfloat16) for i, name in KV}
        first = jnp.full((b, 1), 5, jnp.int32) + (seed % 2).astype(jnp.int32)
        return cache, (fresh, first + jnp.arange(tokens, dtype=jnp.int32))

    def call(cache: Any, fresh: Any, index: Any) -> tuple[Any, Any]:
        new = put_tokens(cache, fresh, index, config=config, implementation=_name(run, peer))
        return new, new["v"][0, 0, 0, :1]

    form = {"op": "put_tokens", "shape": [b, k, tokens, h]}
    return _timed(run, form, peer, inputs, call, 8 * b * k * tokens * h)


def push(
    run: Run, peer: str, config: Any = None, completes: bool = False, bits: int = 2, group: int = 32
) -> Timed:
    b, k, r, h, room = (2, 2, 32, 64, 256) if run.quick else (64, 8, 128, 128, 4096)

    def inputs(seed: Any) -> tuple[Any, tuple]:
        halves = stored((b, k, room, h), bits, group, seed=seed)
        tails = [filled(seed + i, (b, k, r, h), jnp.bfloat16) for i in (10, 11)]
        new = [filled(seed + i, (b, k, 1, h), jnp.bfloat16) for i in (12, 13)]
        tokens = jnp.full(b, (2 + (seed % 2).astype(jnp.int32)) * r - (1 if completes else 2))
        return (*halves, *tails), (*new, tokens)

    def call(cache: Any, key: Any, value: Any, tokens: Any) -> tuple[Any, Any]:
        keys, values, tail_k, tail_v = cache
        new = kivi_push(
            keys, values, tail_k, tail_v, key, value, tokens, jnp.ones_like(tokens), key_bits=bits,
            value_bits=bits, flush="sliding", config=config, implementation=_name(run, peer),
        )  # fmt: skip
        return tuple(new), new.values.zero[0, 0, 0, :1]

    packed = bits / 8 + 4 / group
    size = b * k * h * (8 + packed + (r * (4 + packed) if completes else 0))
    form = {"op": f"kivi_push {bits} bits", "shape": [b, k, r, h], "completes": completes}
    return _timed(run, form, peer, inputs, call, size)


def read(run: Run, peer: str, config: Any = None) -> Timed:
    b, k, g, h, e, r = _less(run)

    def inputs(seed: Any) -> tuple[Any, tuple]:
        q = filled(seed, (b, k, g, 1, h), jnp.bfloat16)
        num, den = _state(seed, b, k, r, h)
        return (), (q, num, den, *_layers(seed, k * g, h, e, r))

    def call(state: Any, q: Any, *rest: Any) -> tuple[Any, Any]:
        return state, low_rank_read(q, *rest, config=config, implementation=_name(run, peer))

    size = 4 * b * k * r * (h + 1) + 4 * k * g * e * (h + r) + b * k * g * h * (2 + 4)
    form = {"op": "low_rank_read", "shape": [b, k, g, h], "hidden": e, "rank": r}
    return _timed(run, form, peer, inputs, call, size)


def update(run: Run, peer: str, config: Any = None) -> Timed:
    b, k, _, h, e, r = _less(run)

    def inputs(seed: Any) -> tuple[Any, tuple]:
        items = [filled(seed + i, (b, k, 1, h), jnp.bfloat16) for i in (3, 4)]
        kernels = *_layers(seed, k, h, e, r), filled(seed + 5, (k, r, r), jnp.float32, 0.1)
        scales = [filled(seed + i, (k, r), jnp.float32) for i in (6, 7)]
        return _state(seed, b, k, r, h), (jnp.ones(b, jnp.int32), *items, *kernels, *scales)

    def call(
        state: tuple[Any, Any], count: Any, key: Any, value: Any, *kernels: Any
    ) -> tuple[Any, Any]:
        given = (*state, key, value, count, *kernels)
        new = low_rank_update(*given, config=config, implementation=_name(run, peer))
        return new, new[1][0, 0, :1]

    size = 8 * b * k * r * (h + 1) + 4 * k * e * (h + r) + 4 * b * k * h
    form = {"op": "low_rank_update", "shape": [b, k, 1, h], "hidden": e, "rank": r}
    return _timed(run, form, peer, inputs, call, size)


def modal(run: Run, peer: str, config: Any = None) -> Timed:
    b, d, k = (2, 64, 4) if run.quick else (64, 4096, 8)

    def inputs(seed: Any) -> tuple[Any, tuple]:
        states = tuple(filled(seed + i, (b, d, k), jnp.float32) for i in (1, 2))
        filters = [filled(seed + i, (d, k), jnp.float32, 0.7) for i in (3, 4, 5, 6)]
        u, h0 = filled(seed, (b, d), jnp.bfloat16), filled(seed + 7, (d,), jnp.float32)
        return states, (u, *filters, h0)

    def call(states: tuple[Any, Any], u: Any, *filters: Any) -> tuple[Any, Any]:
        y, *new = modal_step(*states, u, *filters, config=config, implementation=_name(run, peer))
        return tuple(new), y

    size = 16 * b * d * k + 16 * d * k + 4 * d + 2 * 2 * b * d
    return _timed(run, {"op": "modal_step", "shape": [b, d, k]}, peer, inputs, call, size)


def hyena(run: Run, b: int, d: int, k: int, peer: str, config: Any = None) -> Timed:
    """Of [b, d, k]; no step of the suite, but of the search for tilings."""

    def inputs(seed: Any) -> tuple[Any, tuple]:
        past, p = (filled(seed + i, (b, 3 * d, n), jnp.bfloat16) for i, n in ((0, 2), (10, 1)))
        states = [filled(seed + i, (b, d, k), jnp.float32) for i in (1, 2)]
        filters = [filled(seed + i, (d, k), jnp.float32, 0.7) for i in (3, 4, 5, 6)]
        taps, bias = (filled(seed + i, (3 * d, n), jnp.float32) for i, n in ((8, 3), (9, 1)))
        h0 = filled(seed + 7, (d,), jnp.float32)
        return (past, *states), (p[..., 0], taps, bias[:, 0], (*filters, h0))

    def call(state: Any, p: Any, taps: Any, bias: Any, filters: Any) -> tuple[Any, Any]:
        past, *states = state
        name = _name(run, peer)
        y, *new = hyena_step(
            p, past, taps, bias, *states, *filters, config=config, implementation=name
        )
        return tuple(new), y

    size = 16 * b * d * k + 16 * d * k + 52 * d + b * d * (3 * 2 + 2 * 3 * 2 * 2 + 2)
    return _timed(run, {"op": "hyena_step", "shape": [b, d, k]}, peer, inputs, call, size)


def norm(run: Run, peer: str, config: Any = None, rows: int = 64) -> Timed:
    width = 96 if run.quick else 4096

    def inputs(seed: Any) -> tuple[Any, tuple]:
        x, delta = (filled(seed + i, (rows, width), jnp.bfloat16) for i in (0, 1))
        return x, (delta, filled(seed + 2, (width,), jnp.bfloat16))

    def call(x: Any, delta: Any, scale: Any) -> tuple[Any, Any]:
        return add_norm(
            x, delta, scale, kind="rms", eps=1e-5, config=config, implementation=_name(run, peer)
        )

    form = {"op": "add_norm", "shape": [rows, width]}
    return _timed(run, form, peer, inputs, call, 2 * width * (4 * rows + 1))


def _timed(run: Run, form: dict[str, Any], peer: str, inputs: Any, call: Any, size: float):
    return Timed(
        config={"part": "states", "peer": peer} | form, suite=run, inputs=inputs, call=call,
        bytes=size, slow=5 if peer == "reference" else 1,
    )  # fmt: skip


def _name(run: Run, peer: str) -> Any:
    return run.kernel if peer == "kernel" else peer


def _less(run: Run) -> tuple[int, int, int, int, int, int]:
    """B, K, G, H, E, R: Llama-2-7B at batch 64 with the paper's rank, or tiny."""
    return (2, 2, 2, 64, 32, 8) if run.quick else (64, 32, 1, 128, 512, 8)


def _state(seed: Any, b: int, k: int, r: int, h: int) -> tuple[Any, Any]:
    num = filled(seed + 1, (b, k, r, h), jnp.float32)
    return num, jnp.abs(filled(seed + 2, (b, k, r), jnp.float32)) + 0.1


def _layers(seed: Any, n: int, h: int, e: int, r: int) -> tuple[Any, Any]:
    inner = filled(seed + 8, (n, h, e), jnp.float32, h**-0.5)
    return inner, filled(seed + 9, (n, e, r), jnp.float32, e**-0.5)
