"""Takes one new token per row into a quantized cache, in place."""

from pallas_kernels.kivi_push.api import Pushed, kivi_push

__all__ = ["Pushed", "kivi_push"]
