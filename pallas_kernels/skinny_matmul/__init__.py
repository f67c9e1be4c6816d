"""Products of a few activations with floating weights, several in one launch."""

from pallas_kernels.skinny_matmul.api import feed_forward_hidden, skinny_matmul

__all__ = ["feed_forward_hidden", "skinny_matmul"]
