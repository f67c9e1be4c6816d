"""Typical uses of every GPU kernel, as shapes: what `tools/kernels/inspect_kernels.py` compiles.

A new kernel is one more function with `@kernel`, named as its folder, that yields a `Case` for each
typical use.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One use of a kernel. `launch` is the name that it is launched by (default: its folder's)."""

    config: str
    function: Callable[..., Any]
    args: tuple[Any, ...]  # trees of ShapeDtypeStruct
    operations: int
    bytes: int | None = None  # default: all of `args` and of the results, once
    launch: str | None = None


KERNELS: dict[str, Callable[[], Iterator[Case]]] = {}


def kernel(cases: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    """Registers a kernel under the name of the function that yields its cases."""
    KERNELS[cases.__name__] = cases
    return cases


def array(*shape: int, dtype: str = "bfloat16") -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


@kernel
def dense_attention() -> Iterator[Case]:
    from pallas_kernels.dense_attention import dense_attention as attend
    from pallas_kernels.dense_attention import key_weights

    for name, b, k, g, t, h, slots in (
        ("llama-3 8B, 8 rows, 8k", 8, 8, 4, 1, 128, 8192),
        ("llama-2 7B, 1 row, 4k", 1, 32, 1, 1, 128, 4096),
        ("smollm2, tree of 64, 8k", 1, 3, 3, 64, 64, 8192),
    ):
        q, keys, visible = array(b, k, g, t, h), array(b, k, slots, h), (b, 1, t, slots)
        lse, operations = array(b, k, g, t, dtype="float32"), 2 * b * k * g * t * slots * h
        yield Case(
            config=name, operations=2 * operations,
            function=functools.partial(attend, scale=h**-0.5),
            args=(q, keys, keys, array(*visible, dtype="bool")),
        )  # fmt: skip
        yield Case(
            launch="key_weights", config=name, operations=operations,
            function=functools.partial(key_weights, scale=h**-0.5),
            args=(q, keys, array(*visible, dtype="bool"), lse),
        )  # fmt: skip


@kernel
def weight_matmul() -> Iterator[Case]:
    import jax

    from pallas_kernels.weight_matmul import quantize_weight
    from pallas_kernels.weight_matmul import weight_matmul as multiply

    for name, inputs, outputs, group in (
        ("smollm2 up", 576, 1536, 64),
        ("smollm2 head", 576, 49152, 64),
        ("llama-2 7B up", 4096, 11008, 128),
        ("llama-2 7B down", 11008, 4096, 128),
    ):
        for bits in (4, 8):
            quantize = functools.partial(quantize_weight, bits=bits, group=group)
            weight = jax.eval_shape(quantize, array(outputs, inputs))
            for rows in (1, 16, 64):
                yield Case(
                    config=f"{name}, {bits} bits, {rows} row{'s'[: rows > 1]}",
                    function=multiply, args=(array(rows, inputs), weight),
                    operations=2 * rows * inputs * outputs,
                )  # fmt: skip


@kernel
def kivi_attention() -> Iterator[Case]:
    from pallas_kernels.kivi_attention import kivi_attention as attend

    for name, b, k, g, t, h, slots in (
        ("llama-3 8B, 8 rows, 32k", 8, 8, 4, 1, 128, 32768),
        ("llama-2 7B, 1 row, 4k", 1, 32, 1, 1, 128, 4096),
        ("smollm2, tree of 64, 8k", 1, 3, 3, 64, 64, 8192),
    ):
        for bits in (2, 4, 8):
            yield Case(
                config=f"{name}, {bits} bits", operations=4 * b * k * g * t * slots * h,
                function=functools.partial(
                    attend, key_bits=bits, value_bits=bits, scale=h**-0.5
                ),
                args=(
                    array(b, k, g, t, h), packed(b, k, slots, h, bits, 2),
                    packed(b, k, slots, h, bits, 3), array(b, 1, t, slots, dtype="bool"),
                ),
            )  # fmt: skip


def packed(b: int, k: int, slots: int, h: int, bits: int, axis: int, group: int = 32) -> Any:
    """Keys (axis 2) or values (axis 3) in groups of 32."""
    from pallas_kernels.kivi_attention import PackedHalf

    words, groups = [b, k, slots, h], [b, k, slots, h]
    words[axis] //= 32 // bits
    groups[axis] //= group
    scale = array(*groups, dtype="float16")
    return PackedHalf(array(*words, dtype="uint32"), scale, scale)


@kernel
def quantize_pack() -> Iterator[Case]:
    from pallas_kernels.quantize_pack import quantize_pack as flush

    b, k, h, tokens = 8, 8, 128, 128
    for half, axis in (("keys", 2), ("values", 3)):
        numbers = b * k * h * tokens
        yield Case(
            config=f"llama-3 8B, 8 rows, 128 {half}, 2 bits", operations=8 * numbers,
            function=functools.partial(flush, bits=2, per_channel=axis == 2),
            args=(
                packed(b, k, 32768, h, 2, axis), array(b, k, tokens, h), array(b, 1, dtype="int32"),
            ),
            bytes=numbers * 2 + numbers // 4 + numbers // 32 * 4,
        )  # fmt: skip


@kernel
def put_tokens() -> Iterator[Case]:
    from pallas_kernels.put_tokens import put_tokens as put
    from pallas_kernels.put_tokens import swap_tokens as swap

    for name, b, k, h, slots, tokens in (
        ("llama-2 7B, 1 row", 1, 32, 128, 32768, 1),
        ("smollm2, a prompt of 4096", 1, 3, 64, 32768, 4096),
    ):
        index = array(b, tokens, dtype="int32")
        stored, fresh = ({half: array(b, k, n, h) for half in "kv"} for n in (slots, tokens))
        size = 4 * b * k * tokens * h
        yield Case(
            config=name, operations=0, function=put, args=(stored, fresh, index), bytes=2 * size
        )
    one = b, k, 1
    heavy, new = (
        {"attn_weight": array(*shape, dtype="float32"), "pos": array(*shape, dtype="int32")}
        | {half: array(*shape, h) for half in "kv"}
        for shape in ((b, k, 256), one)
    )
    yield Case(
        launch="swap_tokens", config="smollm2, heavy hitters", operations=0, function=swap,
        args=(heavy, new, array(*one, dtype="int32")), bytes=4 * b * k * (4 * h + 8),
    )  # fmt: skip


@kernel
def kivi_push() -> Iterator[Case]:
    from pallas_kernels.kivi_push import kivi_push as push

    r, bits, number = 128, 2, 2 / 8 + 4 / 32  # bytes of a packed number with its scale and zero
    for name, b, k, h in (("llama-3 8B, 8 rows", 8, 8, 128), ("smollm2, 1 row", 1, 3, 64)):
        rows, tail, new = array(b, dtype="int32"), array(b, k, r, h), array(b, k, 1, h)
        halves = [packed(b, k, 32768, h, bits, axis) for axis in (2, 3)]
        for flush, per_token in (("sliding", 2 + number + 2), ("block", 2 * (2 + number))):
            yield Case(
                config=f"{name}, {flush}, a complete block", operations=16 * b * k * h * r,
                function=functools.partial(push, key_bits=bits, value_bits=bits, flush=flush),
                args=(*halves, tail, tail, new, new, rows, rows),
                bytes=round(b * k * h * (r * per_token + 8)),
            )  # fmt: skip


@kernel
def skinny_matmul() -> Iterator[Case]:
    from pallas_kernels.skinny_matmul import feed_forward_hidden, skinny_matmul

    for model, width, heads, neurons in (
        ("smollm2", 576, (576, 192, 192), 1536),
        ("llama-2 7B", 4096, (4096,) * 3, 11008),
    ):
        up = array(neurons, width)
        for rows in (1, 16):
            x, form = array(rows, width), f"{rows} row{'s'[: rows > 1]}"
            yield Case(
                config=f"{model} q, k, v, {form}", function=skinny_matmul,
                operations=2 * rows * width * sum(heads),
                args=(x, [array(n, width) for n in heads]),
            )  # fmt: skip
            yield Case(
                config=f"{model} gate and up, {form}", operations=4 * rows * width * neurons,
                function=functools.partial(feed_forward_hidden, activation="silu"),
                args=(x, up, up),
            )  # fmt: skip
            yield Case(
                config=f"{model} down, {form}", function=skinny_matmul,
                args=(array(rows, neurons), [array(width, neurons)]),
                operations=2 * rows * width * neurons,
            )  # fmt: skip


@kernel
def sparse_mlp() -> Iterator[Case]:
    from pallas_kernels.sparse_mlp import sparse_mlp as mlp

    for name, d, f in (("smollm2", 576, 1536), ("llama-2 7B", 4096, 11008)):
        for rows in (1, 16):
            for launch in ("sparse_mlp_up", "sparse_mlp_down"):
                weight, blocks = array(f, d), f // 32
                yield Case(
                    launch=launch, config=f"{name}, {rows} row{'s'[: rows > 1]}, all blocks",
                    operations=2 * rows * d * f * (2 if launch.endswith("up") else 1),
                    function=functools.partial(mlp, block_size=32, activation="silu"),
                    args=(
                        array(rows, d), weight, weight, weight, array(blocks, dtype="int32"),
                        array(dtype="int32"),
                    ),
                    bytes=2 * d * f * (2 if launch.endswith("up") else 1),
                )  # fmt: skip


@kernel
def sparse_heads() -> Iterator[Case]:
    from pallas_kernels.sparse_heads import sparse_heads as attend

    b, k, g, h, slots = 8, 8, 4, 128, 8192
    yield Case(
        config="llama-3 8B, 8 rows, 8k, half the groups", operations=4 * b * k // 2 * g * slots * h,
        function=functools.partial(attend, scale=h**-0.5),
        args=(
            array(b, k, g, h), array(b, k, slots, h), array(b, k, slots, h),
            array(b, dtype="int32"), array(b, k // 2, dtype="int32"), array(b, dtype="int32"),
        ),
        bytes=2 * b * k // 2 * slots * h * 2,
    )  # fmt: skip


@kernel
def less_state() -> Iterator[Case]:
    from pallas_kernels.less_state import low_rank_read, low_rank_update

    b, k, g, h, rank, hidden = 8, 32, 1, 128, 8, 512
    state = array(b, k, rank, h, dtype="float32"), array(b, k, rank, dtype="float32")

    def weights(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(array(*shape, dtype="float32") for shape in shapes)

    maps = 2 * b * k * (h * hidden + hidden * rank)
    yield Case(
        launch="low_rank_read", config="llama-2 7B, 8 rows", function=low_rank_read,
        operations=maps + 2 * b * k * rank * h,
        args=(
            array(b, k, g, 1, h), *state, *weights((k * g, h, hidden), (k * g, hidden, rank)),
        ),
    )  # fmt: skip
    yield Case(
        launch="low_rank_update", config="llama-2 7B, 8 rows, 1 token", function=low_rank_update,
        operations=maps + 2 * b * k * (rank * rank + rank * h),
        args=(
            *state, array(b, k, 1, h), array(b, k, 1, h), array(b, dtype="int32"),
            *weights((k, h, hidden), (k, hidden, rank), (k, rank, rank), (k, rank), (k, rank)),
        ),
    )  # fmt: skip


@kernel
def modal_step() -> Iterator[Case]:
    from pallas_kernels.modal_step import hyena_step
    from pallas_kernels.modal_step import modal_step as step

    b, d, k = 64, 4096, 8
    state = (array(b, d, k, dtype="float32"),) * 2
    modes = (*(array(d, k, dtype="float32"),) * 4, array(d, dtype="float32"))
    yield Case(
        config="64 rows, 4096 channels, 8 modes", function=step, operations=12 * b * d * k,
        args=(*state, array(b, d), *modes),
    )  # fmt: skip
    taps = array(3 * d, 3, dtype="float32"), array(3 * d, dtype="float32")
    yield Case(
        launch="hyena_step", config="64 rows, 4096 channels, 8 modes", function=hyena_step,
        operations=b * d * (12 * k + 20),
        args=(array(b, 3 * d), array(b, 3 * d, 2), *taps, *state, *modes),
    )  # fmt: skip


@kernel
def add_norm() -> Iterator[Case]:
    from pallas_kernels.add_norm import add_norm as run

    for name, rows, width in (("smollm2, 1 row", 1, 576), ("llama-2 7B, 64 rows", 64, 4096)):
        yield Case(
            config=name, operations=6 * rows * width,
            function=functools.partial(run, kind="rms", eps=1e-5),
            args=(array(rows, width), array(rows, width), array(width)),
        )  # fmt: skip


@kernel
def merge_splits() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.merge_splits import attend_splits
    from pallas_kernels.merge_splits import merge_splits as merge
    from pallas_kernels.softmax_state import ExtraKeys

    for name, b, k, splits, rows, h in (
        ("smollm2, 1 row, 32k", 1, 3, 88, 3, 64),
        ("llama-2 7B, 1 row, 4k", 1, 32, 9, 1, 128),
    ):
        shape = (b, k, splits, rows)
        state = array(*shape, dtype="float32")
        yield Case(
            config=name, operations=2 * math.prod(shape) * h,
            function=functools.partial(merge, interpret=False),
            args=(array(*shape, h, dtype="float32"), state, state),
        )  # fmt: skip
        rest = ExtraKeys(array(b, k, rows, 1, 1, dtype="float32"), array(b, k, 1, h))
        yield Case(
            config=name + ", to the output", operations=2 * math.prod(shape) * h,
            function=lambda *args: attend_splits(*args, jnp.bfloat16, interpret=False),
            args=(array(*shape, h, dtype="float32"), state, state, rest),
        )  # fmt: skip
