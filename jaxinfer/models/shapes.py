"""Shapes of parameters that mixers and blocks share."""

import jax

from jaxinfer.typing import Params


def abstract_linear(inputs: int, outputs: int, bias: bool, dtype) -> Params:
    """A linear layer: {"weight": [outputs, inputs], "bias": [outputs]?}."""
    params = {"weight": jax.ShapeDtypeStruct((outputs, inputs), dtype)}
    return params | ({"bias": jax.ShapeDtypeStruct((outputs,), dtype)} if bias else {})


def abstract_norm(width: int, bias: bool, dtype) -> Params:
    """A norm: {"scale": [width], "bias": [width]?}."""
    params = {"scale": jax.ShapeDtypeStruct((width,), dtype)}
    return params | ({"bias": jax.ShapeDtypeStruct((width,), dtype)} if bias else {})
