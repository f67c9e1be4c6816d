"""Feed-forward block over the neurons that the input is predicted to need."""

from pallas_kernels.sparse_mlp.api import sparse_mlp

__all__ = ["sparse_mlp"]
