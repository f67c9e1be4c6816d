"""R_rho, a relaxation of optimal transport, without n x m memory (arXiv 2307.10042).

`r_rho` checks, solves and certifies; `distance` is the same under grad, jit and vmap; `debiased`
and `paired` are what to report of samples and of pairs; `sinkhorn` is the baseline.
"""

from jaxinfer.theory.transport.certified import RRhoOutput, r_rho
from jaxinfer.theory.transport.divergence import Debiased, Paired, debiased, paired
from jaxinfer.theory.transport.gradients import distance
from jaxinfer.theory.transport.sinkhorn import SinkhornOutput, sinkhorn

__all__ = [
    "Debiased",
    "Paired",
    "RRhoOutput",
    "SinkhornOutput",
    "debiased",
    "distance",
    "paired",
    "r_rho",
    "sinkhorn",
]
