"""Attention of a few queries over packed 2-, 4- and 8-bit keys and values."""

from pallas_kernels.kivi_attention.api import PackedHalf, kivi_attention

__all__ = ["PackedHalf", "kivi_attention"]
