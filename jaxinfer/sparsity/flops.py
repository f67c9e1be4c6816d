"""The operations of one token by the rule of LTE's table 1 (arXiv 2402.06126): two per weight of
the feed-forward blocks and of the projections of attention or another mixer; no attention scores,
no long convolutions, no head.

Llama-7B gives 12.0625 Gi, of which 8.0625 are feed-forward: the paper's 12.06 GFLOPs are 2**30.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxinfer.config import ModelConfig
from jaxinfer.models.params import abstract_params, is_weight

GI = 2**30


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token, in units of 2**30."""

    feed_forward: float
    attention: float  # or another mixer
    router: float

    @property
    def total(self) -> float:
        return self.feed_forward + self.attention + self.router


def token_flops(
    cfg: ModelConfig, density: float | Sequence[float] = 1.0, *, block_size: int | None = None
) -> TokenFlops:
    """The operations of one token whose feed-forward blocks use the share `density` of their
    neurons (one share, or one per layer), chosen by linear routers of blocks of `block_size`; None:
    there are no routers.

    Raises:
      ValueError: a density outside [0, 1], another number of them than of layers, or blocks that
        do not divide the neurons.
    """
    shares = [density] * cfg.num_layers if isinstance(density, int | float) else list(density)
    if len(shares) != cfg.num_layers:
        raise ValueError(f"{len(shares)} densities are given for {cfg.num_layers} layers")
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"densities lie in [0, 1], got {min(shares)} to {max(shares)}")
    width, neurons = cfg.hidden_size, cfg.intermediate_size
    if block_size is not None and (block_size < 1 or neurons % block_size):
        raise ValueError(f"{neurons} neurons cannot be cut into blocks of {block_size}")
    matrices = [3 if cfg.mlp(layer) == "gated" else 2 for layer in range(cfg.num_layers)]
    routed = 0 if block_size is None else width * (neurons // block_size)
    return TokenFlops(
        feed_forward=2 * width * neurons / GI
        * sum(count * share for count, share in zip(matrices, shares, strict=True)),
        attention=2 * _projections(cfg) / GI,
        router=2 * routed * cfg.num_layers / GI,
    )  # fmt: skip


def _projections(cfg: ModelConfig) -> int:
    """The weights of the mixers of all layers."""
    layers = enumerate(abstract_params(cfg)["layers"])
    leaves = (jax.tree_util.tree_leaves_with_path(layer[cfg.mixer(i)]) for i, layer in layers)
    return sum(leaf.size for each in leaves for path, leaf in each if is_weight(path))


def density_of(cfg: ModelConfig, total: float, *, block_size: int | None = None) -> float:
    """The density at which one token takes `total` operations, in units of 2**30: the inverse of
    `token_flops(...).total`."""
    dense = token_flops(cfg, block_size=block_size)
    return (total - dense.attention - dense.router) / dense.feed_forward


def feed_forward_share(density: float, block_size: int, *, gated: bool) -> float:
    """The share of a block's bytes that one token reads, the router's included: `density` of the
    neurons, and of each block one router's row beside its 2 or 3 rows per neuron."""
    return density + 1 / ((3 if gated else 2) * block_size)
