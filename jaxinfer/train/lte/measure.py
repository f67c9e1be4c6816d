"""What a sparse model is on held-out windows: perplexity, densities, unions.

Axis letters: Q windows, R rows (tokens), J blocks of neurons.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxinfer.config import ModelConfig
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.sparsity.flops import token_flops
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.sparsity.recall import shuffled, unions
from jaxinfer.train.language_model import token_losses
from jaxinfer.typing import Leaf, Params


@dataclass(frozen=True, eq=False)
class Measured:
    """`selected[i]` says which blocks each token of layer i uses; () of a dense model."""

    perplexity: float
    selected: tuple[Bool[np.ndarray, "R J"], ...]

    @property
    def densities(self) -> list[float]:
        """Per layer, the mean share of the blocks."""
        return [float(layer.mean()) for layer in self.selected]

    @property
    def density(self) -> float:
        """Over layers and tokens; 1 of a dense model."""
        return float(np.mean(self.densities)) if self.selected else 1.0

    def unions(self) -> tuple[tuple[float, ...], ...]:
        """Per layer, the share of the blocks that 1, 2, 4, ... tokens of different texts use
        together: what `SparseMlp` wants to know."""
        if not self.selected:
            return ()
        order = shuffled(len(self.selected[0]))
        return tuple(unions(layer[order]) for layer in self.selected)

    def record(self, cfg: ModelConfig, block_size: int) -> dict[str, Any]:
        """For a file. Operations are those of a token, in units of 2**30."""
        found: dict[str, Any] = {"perplexity": round(self.perplexity, 4)}
        if not self.selected:
            return found | {"gflops": token_flops(cfg).total}
        counts = [layer.sum(axis=1) for layer in self.selected]
        units = self.selected[0].shape[1]
        return found | {
            "density": round(self.density, 4),
            "densities": [round(share, 4) for share in self.densities],
            "density_p95": [round(float(np.quantile(n, 0.95)) / units, 4) for n in counts],
            "density_deviation": [round(float(n.std()) / units, 4) for n in counts],
            "empty": [round(float((n == 0).mean()), 4) for n in counts],
            "gflops": token_flops(cfg, self.densities, block_size=block_size).total,
        }


def with_unions(params: Params, measured: Measured) -> Params:
    """A sparse model whose blocks know the unions that were measured; a dense one as it is."""
    if not measured.selected:
        return params
    layers = tuple(
        layer | {"mlp": replace(layer["mlp"], unions=shares)}
        for layer, shares in zip(params["layers"], measured.unions(), strict=True)
    )
    return params | {"layers": layers}


def measure(
    cfg: ModelConfig, params: Params, windows: Int[np.ndarray, "Q T"], *, batch: int = 8
) -> Measured:
    """Reads the windows with a dense or a sparse model; a window sees nothing before its start."""
    read = _reader(cfg)
    losses, parts = [], []
    for first in range(0, len(windows), batch):
        nats, selected = read(params, windows[first : first + batch])
        losses.append(np.asarray(nats, np.float64).ravel())
        parts.append([np.asarray(layer) for layer in selected])
    return Measured(
        math.exp(np.concatenate(losses).mean()),
        tuple(np.concatenate(layer) for layer in zip(*parts, strict=True)),
    )


@functools.lru_cache(maxsize=4)
def _reader(cfg: ModelConfig):
    @jax.jit
    def read(params: Params, tokens: Array) -> tuple[Array, list[Array]]:
        selected = []

        def watched(cfg: ModelConfig, block: Leaf, x: Array, layer: int) -> Array:
            if isinstance(block, SparseMlp):
                selected.append(block.selector((x,)))
            return feed_forward(cfg, block, x, layer)

        return token_losses(cfg, params, tokens, mlp=watched), selected

    return read
