"""Attention of a few queries over a dense cache, and the probability that its keys receive."""

from pallas_kernels.dense_attention.api import dense_attention, key_weights

__all__ = ["dense_attention", "key_weights"]
