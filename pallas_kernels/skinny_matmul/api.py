"""Products of a few rows with floating weights [O, I], the layout of most checkpoints.

A decode step of a few rows is bound by the bytes of the weights and, in a small model, by launches.
XLA multiplies queries, keys and values apart (or concatenates their weights), and splits the inputs
over programs whose sums are one more launch. Here one launch makes all results of one input, with
biases, activation and gate, each sum by one program. Of a weight whose outputs or inputs fall into
equal parts, such as heads, only the live parts may be read. Axis letters: R rows, I inputs, O
outputs, J parts.
"""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activation import check_activation
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.shapes import expect
from pallas_kernels.skinny_matmul import reference
from pallas_kernels.skinny_matmul.configs import Config, heuristic
from pallas_kernels.tuned import choose

Axis = Literal["outputs", "inputs"]


def skinny_matmul(
    x: Float[Array, "... I"],
    weights: Sequence[Array],
    biases: Sequence[Array | None] | None = None,
    *,
    live: Sequence[Array | None] | None = None,
    parts: Axis = "outputs",
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "... _"], ...]:
    """`x @ w.T + b` for each weight and its bias (None: no bias), in the dtype of `x`.

    Sums are float32 and are rounded once, with the bias. Results do not depend on the run: each is
    the sum of one program. Made for R up to 16; more rows read the weights once for each 16.

    Args:
      x: float[..., I]; R are all rows.
      weights: float[O, I] each, of one dtype; O may differ.
      biases: float[O] or None for each weight.
      live: bool[J] or None for each weight, which of J equal parts of its outputs or inputs are
        read; the others count as zeros. J may differ.
      parts: of what the parts are, "outputs" or "inputs".
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.

    Raises:
      ValueError: if a shape or a dtype does not fit.
    """
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    names = [f"weights[{i}]" for i in range(len(weights))]
    live = (None,) * len(weights) if live is None else tuple(live)
    _check_live(weights, live, parts)
    jobs = (1,) * len(weights)
    return _run(x, tuple(weights), biases, names, jobs, None, config, implementation, live, parts)


def feed_forward_hidden(
    x: Float[Array, "... I"],
    up: Array,
    gate: Array | None = None,
    *,
    activation: str,
    up_bias: Array | None = None,
    gate_bias: Array | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "... O"]:
    """`act(gate(x)) * up(x)`, or `act(up(x))` without a gate: what a feed-forward block multiplies
    with its last weight.

    `activation` is "silu", "gelu", "gelu_tanh", "relu" or "identity". All between the products and
    the result is float32. Else as `skinny_matmul`.
    """
    check_activation(activation)
    if gate is None and gate_bias is not None:
        raise ValueError("gate_bias was given without gate; a plain block takes up_bias alone")
    weights, biases, names = (up,), (up_bias,), ["up"]
    if gate is not None:
        weights, biases, names = (gate, up), (gate_bias, up_bias), ["gate", "up"]
    jobs = (len(weights),)
    return _run(x, weights, biases, names, jobs, activation, config, implementation)[0]


def _check_live(weights, live, parts: Axis) -> None:
    if parts not in get_args(Axis) or len(live) != len(weights):
        raise ValueError(
            f'parts must be "outputs" or "inputs", with live parts or None for each of '
            f"{len(weights)} weights, got {parts!r} and {len(live)}"
        )
    for i, (weight, some) in enumerate(zip(weights, live, strict=True)):
        if some is None:
            continue
        expect(f"live[{i}]", some, (None,))
        size = weight.shape[parts == "inputs"]
        if some.dtype != bool or size % some.shape[0]:
            raise ValueError(
                f"live[{i}] must be bool and its length divide the {size} {parts}, got "
                f"{some.dtype}[{some.shape[0]}]"
            )


def _run(
    x, weights, biases, names, jobs, activation, config, implementation, live=None, parts="outputs"
):
    """`jobs` says how many of the weights, in order, go into each result."""
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    if len(biases) != len(weights) or not weights:
        raise ValueError(
            f"each of at least one weight has a bias or None, got {len(weights)} weights and "
            f"{len(biases)} biases"
        )
    for name, weight, bias in zip(names, weights, biases, strict=True):
        expect(name, weight, (weights[0].shape[0] if len(jobs) == 1 else None, x.shape[1]))
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise ValueError(f"{name} must hold floating numbers, got {weight.dtype}")
        if weight.dtype != weights[0].dtype:
            raise ValueError(
                f"{name} must have the dtype of {names[0]}, {weights[0].dtype}, got {weight.dtype}"
            )
        if bias is not None:
            expect(f"the bias of {name}", bias, weight.shape[:1])
    together = len(weights) // len(jobs)
    outputs = sum(weight.shape[0] for weight in weights) // together
    config = config or choose(
        "skinny_matmul", heuristic, *x.shape, outputs, weights[0].dtype.itemsize,
        together=together,
    )  # fmt: skip
    form = {"jobs": jobs, "activation": activation, "dtype": str(x.dtype), "parts": parts}
    live = (None,) * len(weights) if live is None else live
    found = dispatch(
        implementation,
        functools.partial(reference.skinny_matmul, **form),
        functools.partial(_skinny_matmul, config=config, **form),
        x.astype(weights[0].dtype), weights, biases, live,
    )  # fmt: skip
    return tuple(y.reshape(*lead, -1) for y in found)


def _skinny_matmul(*args, **options):
    from pallas_kernels.skinny_matmul import triton  # a CPU never pays for Pallas

    return triton.skinny_matmul(*args, **options)
