"""The activation functions of feed-forward blocks."""

from jaxtyping import Array

from jaxinfer.config import Activation
from pallas_kernels.activation import REFERENCE


def activate(kind: Activation, x: Array) -> Array:
    return REFERENCE[kind](x)
