"""Weight-only quantization for decoding: y = x w.T with w in 4 or 8 bits.

A decode step of a few rows is bound by the bytes of the weights. They are read once, as packed
codes, and never written back as numbers. See `reference` for the layout.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.shapes import blocks_of, expect
from pallas_kernels.tuned import choose
from pallas_kernels.weight_matmul import reference
from pallas_kernels.weight_matmul.configs import Config, heuristic
from pallas_kernels.weight_matmul.reference import QuantizedWeight, words_of


def weight_matmul(
    x: Array,
    weight: QuantizedWeight,
    *,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "R O"]:
    """`x @ w.T` in float32 for activations x [R, I], rounded to bfloat16, and a weight [O, I].

    Products are exact, sums are in float32, and a group's scale multiplies its sum: the result
    differs from that of the dequantized weight by the order of additions alone, and is the same
    in every run. Made for R from 1 to 64; the weight is read once for every 16 rows.
    """
    return weight_matmuls(x, (weight,), config=config, implementation=implementation)[0]


def weight_matmuls(
    x: Array,
    weights: Sequence[QuantizedWeight],
    *,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "R _"], ...]:
    """`weight_matmul` of each weight, in one launch; they have the same bits and group.

    Raises:
      ValueError: if a shape, a dtype or a form does not fit.
    """
    weights = tuple(weights)
    for weight in weights:
        _check(x, weight)
    forms = {(weight.bits, weight.group) for weight in weights}
    if len(forms) != 1:
        raise ValueError(f"weights of one launch have the same bits and group, got {forms}")
    words = sum(weight.codes.shape[1] for weight in weights)
    ((bits, group),) = forms
    sizes = (x.shape[0], words, weights[0].scale.shape[0])
    config = config or choose("weight_matmul", heuristic, *sizes, bits=bits, group=group)
    return dispatch(
        implementation,
        reference.weight_matmuls,
        functools.partial(_weight_matmul, config=config),
        x, weights,
    )  # fmt: skip


def _check(x: Array, weight: QuantizedWeight) -> None:
    outputs, inputs = weight.shape
    expect("x", x, (None, inputs))
    expect("weight.codes", weight.codes, (None, words_of(outputs, weight.bits)))
    groups = blocks_of(inputs, weight.group)
    expect("weight.scale", weight.scale, (groups, outputs))
    if weight.zero is not None:
        expect("weight.zero", weight.zero, (groups, outputs))
    if weight.codes.dtype != jnp.uint32:
        raise ValueError(f"weight.codes must be words of uint32, got {weight.codes.dtype}")


def _weight_matmul(*args, **options):
    from pallas_kernels.weight_matmul import triton  # a CPU never pays for Pallas

    return triton.weight_matmul(*args, **options)
