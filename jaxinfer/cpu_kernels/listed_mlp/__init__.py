"""A feed-forward block over listed blocks of neurons."""

from jaxinfer.cpu_kernels.listed_mlp.api import ACTIVATIONS, fits, listed_mlp

__all__ = ["ACTIVATIONS", "fits", "listed_mlp"]
