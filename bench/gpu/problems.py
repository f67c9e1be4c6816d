"""Random problems for each kernel: shapes, arguments and how far from exact a kernel may be.

Tolerances are relative to the largest magnitude of an output. Float32 operands are multiplied as
such (5e-5: the order of sums over thousands of keys), but for LESS, whose two layers round them to
TF32's 11 bits (5e-3); bfloat16 ones are rounded on the way, as in the kernels' tests (3e-2).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.ops.quantize import pack, quantize
from pallas_kernels.add_norm import add_norm
from pallas_kernels.dense_attention import dense_attention, key_weights
from pallas_kernels.kivi_attention import PackedHalf, kivi_attention
from pallas_kernels.kivi_attention.reference import unpacked
from pallas_kernels.kivi_push import kivi_push
from pallas_kernels.less_state import low_rank_read, low_rank_update
from pallas_kernels.modal_step import hyena_step, modal_step
from pallas_kernels.put_tokens import put_tokens, swap_tokens
from pallas_kernels.quantize_pack import quantize_pack
from pallas_kernels.skinny_matmul import feed_forward_hidden, skinny_matmul
from pallas_kernels.softmax_state import NEGATIVE, ExtraKeys
from pallas_kernels.sparse_heads import sparse_heads
from pallas_kernels.sparse_mlp import sparse_mlp
from pallas_kernels.weight_matmul import quantize_weight, weight_matmul

Rng = np.random.Generator


@dataclass(kw_only=True)
class Problem:
    """`run(*args, implementation=...)`; with `widens` the reference gets its floats in float32."""

    run: Callable[..., Any]
    args: tuple
    tolerance: float
    widens: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


def dense(rng: Rng, quick: bool) -> Problem:
    q, dtype, (b, k, _, t, h) = _queries(rng, quick, sizes=(64, 80, 128))
    s = _slots(rng, quick)
    keys, values = _some(rng, dtype, b, k, s, h), _some(rng, dtype, b, k, s, h)
    visible, distance, stop, spec = _masks(rng, q.shape, s)
    run = functools.partial(dense_attention, **spec)
    rest = _rest(rng, q, dtype)
    facts = _facts(q, slots=s, dtype=dtype, extra=rest is not None)
    args = (q, keys, values, visible, distance, stop, rest)
    return Problem(run=run, args=args, tolerance=_tolerance(dtype), facts=facts)


def attn_weight(rng: Rng, quick: bool) -> Problem:
    q, dtype, (b, k, g, t, h) = _queries(rng, quick, sizes=(64, 128))
    s = _slots(rng, quick)
    visible, distance, stop, spec = _masks(rng, q.shape, s)
    lse = jnp.asarray(rng.normal(size=(b, k, g, t)) + 3, jnp.float32)
    run = functools.partial(key_weights, **spec)
    args = (q, _some(rng, dtype, b, k, s, h), visible, lse, distance, stop)
    # a rounded score moves its probability by as much: bfloat16 scores reach 4 and more
    return Problem(
        run=run, args=args, tolerance=_tolerance(dtype), facts=_facts(q, slots=s, dtype=dtype)
    )


def kivi(rng: Rng, quick: bool) -> Problem:
    q, dtype, (b, k, _, t, h) = _queries(rng, quick, sizes=(64, 128))
    s = _slots(rng, quick)
    room = -(-s // 128) * 128
    bits = [int(x) for x in rng.choice([2, 4, 8], 2)]
    halves = [
        packed(rng.normal(size=(b, k, room, h)), bits[i], int(rng.choice([32, 64])), axis=2 + i)
        for i in range(2)
    ]
    visible, distance, stop, spec = _masks(rng, q.shape, s)
    run = functools.partial(kivi_attention, key_bits=bits[0], value_bits=bits[1], **spec)
    facts = _facts(q, slots=s, dtype=dtype, bits=bits)
    args = (q, *halves, visible, distance, stop, _rest(rng, q, dtype))
    return Problem(run=run, args=args, tolerance=_tolerance(dtype), facts=facts)


def flush(rng: Rng, quick: bool) -> Problem:
    """Codes as numbers: one may differ by 1 of 2**bits - 1, as quotients next to a half may."""
    b, k, h = int(rng.integers(1, 5)), int(rng.integers(1, 9)), int(rng.choice([64, 128]))
    bits, is_key = int(rng.choice([2, 4, 8])), bool(rng.integers(2))
    run_size, runs = (32, int(rng.integers(1, 4))) if is_key else (int(rng.choice([1, 4])), 1)
    half = packed(rng.normal(size=(b, k, 256, h)), bits, 32, axis=2 if is_key else 3)
    x = _some(rng, rng.choice(["float32", "bfloat16"]), b, k, runs * run_size, h)
    places = [rng.permutation(256 // run_size)[:runs] for _ in range(b)]
    index = jnp.asarray(np.stack(places), jnp.int32)

    def numbers(half, x, index, implementation):
        new = quantize_pack(
            half, x, index, bits=bits, per_channel=is_key, implementation=implementation
        )
        one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
        return unpacked(new.words, one, none, bits, is_key), new.scale, new.zero

    facts = {"shape": [b, k, runs * run_size, h], "bits": bits, "per_channel": is_key}
    tolerance = 1.001 / (2**bits - 1)
    return Problem(
        run=numbers, args=(half, x, index), tolerance=tolerance, widens=False, facts=facts
    )


def put(rng: Rng, quick: bool, swaps: bool = False) -> Problem:
    """Tokens with attention weights and positions, of which some go nowhere; exact."""
    b, k, h = int(rng.integers(1, 5)), int(rng.integers(1, 9)), int(rng.choice([64, 80, 128]))
    a, slots = [1, int(rng.integers(2, 70 if quick else 3000))][rng.integers(2)], 3000
    dtypes = [str(x) for x in rng.choice(["float32", "bfloat16", "float16"], 2)]

    def arrays(dtype: str, tokens: int, heads: int) -> dict[str, Any]:
        pos = jnp.asarray(rng.integers(0, 99, (b, heads, tokens)), jnp.int32)
        found = {name: _some(rng, dtype, b, k, tokens, h) for name in "kv"}
        return found | {"attn_weight": _some(rng, "float32", b, k, tokens), "pos": pos}

    places = [rng.permutation(slots + a)[:a] for _ in range(b * k)]
    index = jnp.asarray(np.reshape(places, (b, k, a)), jnp.int32)
    args = arrays(dtypes[0], slots, k), arrays(dtypes[1], a, 1), index
    facts = {"shape": [b, k, a, h], "dtypes": dtypes}
    run = swap_tokens if swaps else put_tokens
    return Problem(run=run, args=args, tolerance=0.0, widens=False, facts=facts)


def push(rng: Rng, quick: bool) -> Problem:
    """Codes as numbers, as in `flush`; where the tail's keys are what codes read as, one that
    differs by 1 moves a key by a step, which is at most twice the largest one over the levels."""
    b, k, h = int(rng.integers(2, 5)), int(rng.integers(1, 9)), int(rng.choice([64, 128]))
    bits = [int(x) for x in rng.choice([2, 4, 8], 2)]
    group, flush = int(rng.choice([32, 64])), str(rng.choice(["sliding", "block"]))
    residual, dtype = group * int(rng.integers(1, 4)), rng.choice(["float32", "bfloat16"])
    room = residual * 4
    halves = [
        packed(rng.normal(size=(b, k, room, h)), bits[i], group, axis=2 + i) for i in range(2)
    ]
    stored, count = rng.integers(0, room + residual, b), rng.integers(0, 2, b)
    stored[0], count[0] = residual * rng.integers(1, 5) - 1, 1  # which completes a block
    numbers = (_some(rng, dtype, b, k, n, h) for n in (residual, residual, 1, 1))
    args = *halves, *numbers, *(jnp.asarray(x, jnp.int32) for x in (stored, count))

    def run(*args, implementation):
        *halves, tail_k, tail_v = kivi_push(
            *args, key_bits=bits[0], value_bits=bits[1], flush=flush, implementation=implementation
        )
        one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
        codes = [
            unpacked(half.words, one, none, bits[i], token_words=i == 0)
            for i, half in enumerate(halves)
        ]
        return codes, [half[1:] for half in halves], tail_k, tail_v

    facts = {"shape": [b, k, residual, h], "bits": bits, "group": group, "flush": flush}
    steps = 2.001 if flush == "sliding" else 1.001
    tolerance = steps / (2 ** min(bits) - 1)
    return Problem(run=run, args=args, tolerance=tolerance, widens=False, facts=facts)


def mlp(rng: Rng, quick: bool) -> Problem:
    d, f, size = (64, 200, 16) if quick else (int(rng.choice([576, 1024])), 3001, 32)
    kind = str(rng.choice(["one row", "shared list", "list per row"]))
    b = {"one row": 1, "shared list": int(rng.integers(2, 40)), "list per row": 3}[kind]
    dtype, total = rng.choice(["float32", "bfloat16"]), -(-f // size)
    cap = int(rng.integers(1, total + 1))
    lists = b if kind == "list per row" else 1
    blocks = np.stack([rng.permutation(total)[:cap] for _ in range(lists)])
    count = rng.integers(1, cap + 1, lists)
    if lists == 1:
        blocks, count = blocks[0], count[0]
    gate = _some(rng, dtype, f, d) if rng.random() < 0.5 else None
    run = functools.partial(
        sparse_mlp, block_size=size, activation=str(rng.choice(["silu", "relu"]))
    )
    x = jnp.asarray(rng.normal(size=(b, d)) / d**0.5, dtype)
    up, down = _some(rng, dtype, f, d), _some(rng, dtype, f, d)
    args = (x, gate, up, down, jnp.asarray(blocks, jnp.int32), jnp.asarray(count, jnp.int32))
    facts = {"shape": [b, d, f], "kind": kind, "is_gated": gate is not None, "dtype": str(dtype)}
    return Problem(run=run, args=args, tolerance=_tolerance(dtype), facts=facts)


def skinny(rng: Rng, quick: bool) -> Problem:
    rows, most = int(rng.choice([1, 1, 4, 16])), 100 if quick else 3000
    inputs, dtype = int(rng.integers(1, most)), rng.choice(["float32", "bfloat16"])
    outputs = [int(n) for n in rng.integers(1, most, 3)]
    args = (
        jnp.asarray(rng.normal(size=(rows, inputs)) / inputs**0.5, dtype),
        [_some(rng, dtype, n, inputs) for n in outputs],
        [_some(rng, dtype, outputs[0]), None, None],
    )
    facts = {"shape": [rows, inputs, *outputs], "dtype": str(dtype)}
    return Problem(run=skinny_matmul, args=args, tolerance=_tolerance(dtype), facts=facts)


def hidden(rng: Rng, quick: bool) -> Problem:
    rows, most = int(rng.choice([1, 1, 4, 16])), 100 if quick else 3000
    (d, f), dtype = rng.integers(1, most, 2), rng.choice(["float32", "bfloat16"])
    kind = str(rng.choice(["silu", "gelu", "gelu_tanh", "relu"]))
    x = jnp.asarray(rng.normal(size=(rows, d)) / d**0.5, dtype)
    gate = _some(rng, dtype, f, d) if rng.random() < 0.5 else None
    args = (x, _some(rng, dtype, f, d), gate)
    facts = {"shape": [rows, int(d), int(f)], "activation": kind, "dtype": str(dtype)}
    run = functools.partial(feed_forward_hidden, activation=kind)
    return Problem(run=run, args=args, tolerance=_tolerance(dtype), facts=facts)


def heads(rng: Rng, quick: bool) -> Problem:
    q, dtype, (b, k, _, _, h) = _queries(rng, quick, sizes=(64, 80, 128), most=1)
    s, cap = _slots(rng, quick), int(rng.integers(1, k + 1))
    groups = np.stack([rng.permutation(k)[:cap] for _ in range(b)])
    integers = rng.integers(0, s + 1, b), groups, rng.integers(0, cap + 1, b)
    args = (q[:, :, :, 0], _some(rng, dtype, b, k, s, h), _some(rng, dtype, b, k, s, h))
    run = functools.partial(sparse_heads, scale=float(h**-0.5))
    args += tuple(jnp.asarray(x, jnp.int32) for x in integers)
    facts = _facts(q, slots=s, dtype=dtype)
    return Problem(run=run, args=args, tolerance=_tolerance(dtype), facts=facts)


def weight(rng: Rng, quick: bool) -> Problem:
    rows, bits = int(rng.choice([1, 3, 16, 40])), int(rng.choice([4, 8]))
    group = int(rng.choice([32, 64, 128]))
    outputs, inputs = (
        int(rng.integers(100, 300 if quick else 3000)),
        group * int(rng.integers(1, 9)),
    )
    stored = quantize_weight(_some(rng, "float32", outputs, inputs), bits, group)
    x = _some(rng, rng.choice(["float32", "bfloat16"]), rows, inputs)
    facts = {"shape": [rows, outputs, inputs], "bits": bits, "group": group}
    # both round x to bfloat16; what remains is the order of float32 sums
    return Problem(run=weight_matmul, args=(x, stored), tolerance=5e-5, widens=False, facts=facts)


def less_read(rng: Rng, quick: bool) -> Problem:
    b, k, g, t, h, e, r = _less_shape(rng, quick)
    inner, outer = _layers(rng, k * g, h, e, r)
    num, den = _some(rng, "float32", b, k, r, h), jnp.abs(_some(rng, "float32", b, k, r))

    def run(*args, implementation):
        acc, peak, norm = low_rank_read(*args, implementation=implementation)
        total = norm * jnp.exp(peak)  # what a merge sees; the logarithm of almost 0 is ill-posed
        return acc * total[..., None], total, norm

    args = (_some(rng, "bfloat16", b, k, g, t, h), num, den, inner, outer)
    facts = {"shape": [b, k, g, t, h], "hidden": e, "rank": r}
    return Problem(run=run, args=args, tolerance=5e-3, facts=facts)


def less_update(rng: Rng, quick: bool) -> Problem:
    b, k, _, a, h, e, r = _less_shape(rng, quick)
    inner, outer = _layers(rng, k, h, e, r)
    num, den = _some(rng, "float32", b, k, r, h), jnp.abs(_some(rng, "float32", b, k, r))
    count = jnp.asarray(rng.integers(0, a + 1, b), jnp.int32)
    mix = _some(rng, "float32", k, r, r) / r**0.5
    scales = _some(rng, "float32", k, r), _some(rng, "float32", k, r)
    items = _some(rng, "bfloat16", b, k, a, h), _some(rng, "bfloat16", b, k, a, h)
    args = (num, den, *items, count, inner, outer, mix, *scales)
    facts = {"shape": [b, k, a, h], "hidden": e, "rank": r}
    return Problem(run=low_rank_update, args=args, tolerance=5e-3, facts=facts)


def modal(rng: Rng, quick: bool) -> Problem:
    b, d, k = int(rng.integers(1, 9)), int(rng.integers(30, 100 if quick else 2000)), 8
    args = (_some(rng, "float32", b, d, k), _some(rng, "float32", b, d, k))
    args += (_some(rng, "bfloat16", b, d), *_filters(rng, d, k))
    facts = {"shape": [b, d, k]}
    return Problem(run=modal_step, args=args, tolerance=1e-2, facts=facts)  # y is rounded


def hyena(rng: Rng, quick: bool) -> Problem:
    b, d, k, taps = int(rng.integers(1, 9)), int(rng.integers(30, 100 if quick else 2000)), 8, 3
    args = (_some(rng, "bfloat16", b, 3 * d), _some(rng, "bfloat16", b, 3 * d, taps - 1))
    args += (_some(rng, "float32", 3 * d, taps), _some(rng, "float32", 3 * d))
    args += (_some(rng, "float32", b, d, k), _some(rng, "float32", b, d, k), *_filters(rng, d, k))
    facts = {"shape": [b, d, k]}
    return Problem(run=hyena_step, args=args, tolerance=1e-2, facts=facts)


def norm(rng: Rng, quick: bool) -> Problem:
    rows, width = int(rng.integers(1, 9)), int(rng.integers(30, 100 if quick else 9000))
    dtype, kind = rng.choice(["float32", "bfloat16"]), rng.choice(["rms", "layer"])
    delta = _some(rng, dtype, rows, width) if rng.random() < 0.7 else None
    scale, bias = (_some(rng, dtype, width) for _ in range(2))
    args = (_some(rng, dtype, rows, width), delta, scale, bias if kind == "layer" else None)
    return Problem(
        run=functools.partial(add_norm, kind=kind, eps=1e-5), args=args,
        tolerance=_tolerance(dtype), facts={"shape": [rows, width], "kind": kind, "dtype": dtype},
    )  # fmt: skip


def packed(x: np.ndarray, bits: int, group: int, axis: int) -> PackedHalf:
    codes, scale, zero = quantize(jnp.asarray(x, jnp.float32), bits, group, axis, "float16")
    return PackedHalf(pack(codes, bits, axis), scale, zero)


def _queries(rng: Rng, quick: bool, sizes: tuple[int, ...], most: int = 6):
    """q [B, K, G, T, H], its dtype and shape."""
    b, k, g = (int(rng.integers(1, high)) for high in ((3, 3, 3) if quick else (5, 9, 6)))
    shape = (b, k, g, int(rng.integers(1, most + 1)), int(rng.choice(sizes)))
    dtype = rng.choice(["float32", "bfloat16"])
    return _some(rng, dtype, *shape), dtype, shape


def _slots(rng: Rng, quick: bool) -> int:
    return int(rng.integers(100, 200 if quick else 3000))


def _masks(rng: Rng, shape: tuple[int, ...], s: int):
    """visible, distance, stop and the form of the scores."""
    b, k, g, t, h = shape
    visible = jnp.asarray(rng.random((b, 1, t, s)) < rng.choice([0.5, 1.0]))
    spec: dict[str, Any] = {
        "scale": float(h**-0.5),
        "softcap": 20.0 if rng.random() < 0.5 else None,
    }
    distance = None
    if rng.random() < 0.3:
        distance = jnp.asarray(rng.integers(0, 60, (b, 1, t, s)), jnp.int32)
        spec["slopes"] = tuple(rng.uniform(0.01, 0.3, k * g).tolist())
    return visible, distance, jnp.asarray(rng.integers(1, s + 1, b), jnp.int32), spec


def _less_shape(rng: Rng, quick: bool) -> tuple[int, ...]:
    b, k, g, t = (int(rng.integers(1, high)) for high in ((3, 3, 3, 3) if quick else (9, 9, 4, 6)))
    return b, k, g, t, int(rng.choice([64, 128])), 64, int(rng.choice([8, 16]))


def _layers(rng: Rng, n: int, h: int, e: int, r: int):
    return _some(rng, "float32", n, h, e) / h**0.5, _some(rng, "float32", n, e, r) / e**0.5


def _filters(rng: Rng, d: int, k: int):
    poles = rng.uniform(0.5, 0.999, (d, k)) * np.exp(1j * rng.uniform(0, 2 * np.pi, (d, k)))
    parts = poles.real, poles.imag, *(rng.normal(size=(2, d, k)) / k), rng.normal(size=d)
    return tuple(jnp.asarray(x, jnp.float32) for x in parts)


def _rest(rng: Rng, q: Any, dtype: Any) -> ExtraKeys | None:
    """Nothing, or a few fresh keys of which some are hidden, perhaps with a state of others."""
    if rng.random() < 0.3:
        return None
    b, k, _, _, h = q.shape
    fresh = int(rng.integers(1, 9))
    hidden = rng.random((*q.shape[:-1], fresh)) < 0.3
    scores = jnp.where(hidden, NEGATIVE, 3 * rng.normal(size=hidden.shape))
    state = None
    if rng.random() < 0.5:
        state = (
            _some(rng, "float32", *q.shape), _some(rng, "float32", *q.shape[:-1]),
            jnp.asarray(rng.uniform(1, 9, q.shape[:-1]), jnp.float32),
        )  # fmt: skip
    return ExtraKeys(scores.astype(jnp.float32), _some(rng, dtype, b, k, fresh, h), state)


def _some(rng: Rng, dtype: Any, *shape: int):
    return jnp.asarray(rng.normal(size=shape), dtype)


def _tolerance(dtype: Any) -> float:
    return 5e-5 if dtype == "float32" else 3e-2


def _facts(q: Any, **more: Any) -> dict[str, Any]:
    return {"shape": list(q.shape)} | {name: str(x) for name, x in more.items()}


PROBLEMS: dict[str, Callable[[Rng, bool], Problem]] = {
    "dense_attention": dense,
    "key_weights": attn_weight,
    "kivi_attention": kivi,
    "quantize_pack": flush,
    "put_tokens": put,
    "swap_tokens": functools.partial(put, swaps=True),
    "sparse_mlp": mlp,
    "sparse_heads": heads,
    "skinny_matmul": skinny,
    "feed_forward_hidden": hidden,
    "weight_matmul": weight,
    "low_rank_read": less_read,
    "low_rank_update": less_update,
    "modal_step": modal,
    "hyena_step": hyena,
    "add_norm": norm,
    "kivi_push": push,
}
