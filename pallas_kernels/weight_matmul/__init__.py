"""Products of a few activations with weights of 4 or 8 bits."""

from pallas_kernels.weight_matmul.api import weight_matmul, weight_matmuls
from pallas_kernels.weight_matmul.reference import (
    QuantizedWeight,
    dequantize_rows,
    dequantize_weight,
    quantize_weight,
)

__all__ = [
    "QuantizedWeight",
    "dequantize_rows",
    "dequantize_weight",
    "quantize_weight",
    "weight_matmul",
    "weight_matmuls",
]
