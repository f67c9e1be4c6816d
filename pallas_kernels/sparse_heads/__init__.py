"""Attention of one token over the key/value heads that it is predicted to need."""

from pallas_kernels.sparse_heads.api import sparse_heads

__all__ = ["sparse_heads"]
