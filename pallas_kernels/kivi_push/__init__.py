"""Takes one new token per row into a quantized cache, in place."""

from pallas_kernels.kivi_push.api import kivi_push

__all__ = ["kivi_push"]
