"""Quantizes blocks of tokens and writes their codes into a cache, in place."""

from pallas_kernels.quantize_pack.api import quantize_pack

__all__ = ["quantize_pack"]
