"""The uses of every GPU kernel that `tools/kernels/tune_kernels.py` tries tilings on.

A new kernel is one more function with `@kernel` that yields a `Problem` for each use that is worth
an entry.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 2**18  # of a batch: the reference makes all packed codes float32 numbers at once
GROUP = 32  # of packed codes
Step = Any  # bench.gpu.timing.Timed


def same(results: Any) -> Any:
    return results


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One use of a kernel: `make(implementation, config)` is its step, whose results, as `view`
    shows them, may differ from the reference's by `tolerance` of each output's magnitude."""

    kernel: str
    make: Callable[..., Step]
    candidates: Callable[..., list[Any]]
    tolerance: float
    view: Callable[[Any], Any] = same


KERNELS: dict[str, Callable[[Any], Iterator[Problem]]] = {}


def kernel(problems: Callable[[Any], Iterator[Problem]]) -> Callable[[Any], Iterator[Problem]]:
    """Registers a kernel under the name of the function that yields its problems."""
    KERNELS[problems.__name__] = problems
    return problems


@kernel
def kivi_attention(run: Any) -> Iterator[Problem]:
    from bench.gpu.attention_part import timed
    from pallas_kernels.kivi_attention.configs import candidates

    for shape, bits in itertools.product(attention_shapes(run), (2, 4, 8)):
        make = functools.partial(timed, run, *shape, bits)
        yield Problem(kernel="kivi_attention", make=make, candidates=candidates, tolerance=3e-2)


@kernel
def dense_attention(run: Any) -> Iterator[Problem]:
    from bench.gpu.attention_part import timed
    from pallas_kernels.dense_attention.configs import candidates

    for shape in attention_shapes(run):
        make = functools.partial(timed, run, *shape, None)
        yield Problem(kernel="dense_attention", make=make, candidates=candidates, tolerance=3e-2)


def attention_shapes(run: Any) -> list[tuple[str, int, int]]:
    """(model, batch, slots), those of the suite of which the reference has room for all."""
    from bench.gpu.attention_part import shapes

    return [shape for shape in shapes(run) if shape[1] * shape[2] <= MOST_TOKENS]


@kernel
def weight_matmul(run: Any) -> Iterator[Problem]:
    from pallas_kernels.weight_matmul.configs import candidates

    for make in products(run, 4, 8):
        yield Problem(kernel="weight_matmul", make=make, candidates=candidates, tolerance=5e-5)


@kernel
def skinny_matmul(run: Any) -> Iterator[Problem]:
    from pallas_kernels.skinny_matmul.configs import candidates

    for make in products(run, 16):
        yield Problem(kernel="skinny_matmul", make=make, candidates=candidates, tolerance=3e-2)


def products(run: Any, *bits: int) -> Iterator[Callable[..., Step]]:
    """The suite's products with weights of so many bits."""
    from bench.gpu.weights_part import PRODUCTS, ROWS, product

    shapes = ((128, 192),) if run.quick else PRODUCTS
    for (inputs, outputs), rows, width in itertools.product(shapes, ROWS, bits):
        yield functools.partial(product, run, rows, inputs, outputs, width)


@kernel
def sparse_mlp(run: Any) -> Iterator[Problem]:
    from bench.gpu.weights_part import BLOCKS, ROWS, mlp
    from pallas_kernels.sparse_mlp.configs import candidates

    blocks = ((64, 160),) if run.quick else BLOCKS
    for (width, neurons), rows, density in itertools.product(blocks, ROWS, (1.0, 0.25)):
        make = functools.partial(mlp, run, rows, width, neurons, density)
        yield Problem(kernel="sparse_mlp", make=make, candidates=candidates, tolerance=3e-2)


@kernel
def quantize_pack(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import flush
    from pallas_kernels.kivi_attention.reference import unpacked
    from pallas_kernels.quantize_pack.configs import candidates

    def numbers(results: Any, bits: int, is_key: bool) -> Any:
        """Codes as numbers: next to a half one may differ by 1. Nothing is written behind 384."""
        import jax.numpy as jnp

        half, _ = results
        end = 384 * bits // 32 if is_key else 384
        one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
        return unpacked(half.words[:, :, :end], one, none, bits, is_key), half.scale, half.zero

    for is_key, bits in itertools.product((True, False), (2, 4)):
        yield Problem(
            kernel="quantize_pack", candidates=candidates, tolerance=1.001 / (2**bits - 1),
            make=functools.partial(flush, run, bits=bits, group=GROUP, is_key=is_key),
            view=functools.partial(numbers, bits=bits, is_key=is_key),
        )  # fmt: skip


@kernel
def put_tokens(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import put
    from pallas_kernels.put_tokens.configs import candidates

    for tokens in (1, 64, 2048):
        make = functools.partial(put, run, tokens=tokens)
        yield Problem(kernel="put_tokens", make=make, candidates=candidates, tolerance=0.0)


@kernel
def kivi_push(run: Any) -> Iterator[Problem]:
    """By the usual step, which completes no block."""
    from bench.gpu.states_part import push
    from pallas_kernels.kivi_attention.reference import unpacked
    from pallas_kernels.kivi_push.configs import candidates

    def numbers(results: Any, bits: int) -> Any:
        """Codes as numbers: next to a half one may differ by 1. No value goes behind 256."""
        import jax.numpy as jnp

        (keys, values, *tails), _ = results
        one, none = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
        codes = unpacked(values.words[:, :, :256], one, none, bits, False)
        return keys, codes, values[1:], tails

    for bits in (2, 4):
        yield Problem(
            kernel="kivi_push", candidates=candidates, tolerance=1.001 / (2**bits - 1),
            make=functools.partial(push, run, bits=bits, group=GROUP),
            view=functools.partial(numbers, bits=bits),
        )  # fmt: skip


@kernel
def low_rank_read(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import read
    from pallas_kernels.less_state.configs import candidates

    make = functools.partial(read, run)
    yield Problem(kernel="low_rank_read", make=make, candidates=candidates, tolerance=5e-3)


@kernel
def low_rank_update(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import update
    from pallas_kernels.less_state.configs import candidates

    make = functools.partial(update, run)
    yield Problem(kernel="low_rank_update", make=make, candidates=candidates, tolerance=5e-3)


@kernel
def modal_step(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import modal
    from pallas_kernels.modal_step.configs import candidates

    make = functools.partial(modal, run)
    yield Problem(kernel="modal_step", make=make, candidates=candidates, tolerance=1e-2)


@kernel
def hyena_step(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import hyena
    from pallas_kernels.modal_step.configs import candidates

    for shape in [(2, 64, 4)] if run.quick else [(64, 4096, 8), (1, 4096, 8)]:
        make = functools.partial(hyena, run, *shape)
        yield Problem(kernel="hyena_step", make=make, candidates=candidates, tolerance=1e-2)


@kernel
def add_norm(run: Any) -> Iterator[Problem]:
    from bench.gpu.states_part import norm
    from pallas_kernels.add_norm.configs import candidates

    for rows in (1, 8, 64):
        make = functools.partial(norm, run, rows=rows)
        yield Problem(kernel="add_norm", make=make, candidates=candidates, tolerance=3e-2)


@kernel
def sparse_heads(run: Any) -> Iterator[Problem]:
    from bench.gpu.attention_part import half_of_heads
    from pallas_kernels.sparse_heads.configs import candidates

    for shape in attention_shapes(run):
        make = functools.partial(half_of_heads, run, *shape)
        yield Problem(kernel="sparse_heads", make=make, candidates=candidates, tolerance=3e-2)


@kernel
def key_weights(run: Any) -> Iterator[Problem]:
    from bench.gpu.attention_part import attn_weight
    from pallas_kernels.dense_attention.configs import weight_candidates

    for shape in attention_shapes(run):
        make = functools.partial(attn_weight, run, *shape)
        yield Problem(kernel="key_weights", make=make, candidates=weight_candidates, tolerance=3e-2)
