"""Group quantization and packed codes, as `pallas_kernels.quantization` has them."""

from pallas_kernels.quantization import (
    BITS,
    SCALE_DTYPES,
    Quantized,
    dequantize,
    pack,
    put_runs,
    quantize,
    unpack,
)

__all__ = [
    "BITS", "SCALE_DTYPES", "Quantized", "dequantize", "pack", "put_runs", "quantize", "unpack",
]  # fmt: skip
