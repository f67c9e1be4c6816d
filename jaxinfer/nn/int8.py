"""Weights in int8 on disk: codes and one scale per output, about a byte per parameter."""

import numpy as np
from jaxtyping import Float, Float32, Int8


def quantize_rows(x: Float[np.ndarray, "A R *C"]) -> tuple[Int8[np.ndarray, "A R *C"], np.ndarray]:
    """Codes, and the float32 scale that all along axis 1 share.

    Scales have 16 significant bits, rounded up: codes times scale are exact, so that
    quantizing what was dequantized changes nothing.
    """
    largest = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(2.0**-100))
    bits = (largest / np.float32(127)).astype(np.float32).view(np.uint32)
    scale = ((bits + np.uint32(0xFF)) & np.uint32(0xFFFFFF00)).view(np.float32)
    return np.rint(x / scale).astype(np.int8), scale


def dequantize_rows(
    codes: Int8[np.ndarray, "..."], scale: np.ndarray
) -> Float32[np.ndarray, "..."]:
    """Codes times scale."""
    return codes.astype(np.float32) * scale
