"""What a sparse model's selections are like on a text: how many blocks several tokens use together,
how far neighbouring tokens agree, and what a selection misses.

Axis letters: B rows of a text, T tokens, R = B T, J units of a block.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxinfer.config import ModelConfig
from jaxinfer.nn.block_mlp import hidden_values
from jaxinfer.sparsity.masked import MaskedMlp
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.sparsity.observe import watch_layers
from jaxinfer.typing import Json, Params

DRAWS = 200  # of so many tokens each, for the union


def selections(
    cfg: ModelConfig, params: Params, tokens: Int[np.ndarray, "B T"]
) -> tuple[Bool[np.ndarray, "B T _"], ...]:
    """Which units every token uses, per layer; a dense block is one unit."""
    found = watch_layers(cfg, params, jnp.asarray(tokens), _selection)
    return tuple(np.asarray(one) for one in found)


def unions(
    selected: Bool[np.ndarray, "B T J"], sizes: Sequence[int] = (1, 2, 4, 8, 16), seed: int = 0
) -> tuple[float, ...]:
    """The share of the units that `sizes[i]` tokens of different places use together: what a batch
    reads. For independent tokens of density r it is 1 - (1 - r) ** size."""
    flat = selected.reshape(-1, selected.shape[-1])
    rng, shares = np.random.default_rng(seed), []
    for size in sizes:
        picked = np.stack(
            [rng.choice(len(flat), min(size, len(flat)), False) for _ in range(DRAWS)]
        )
        shares.append(float(flat[picked].any(axis=1).mean()))
    return tuple(shares)


def neighbour_overlap(selected: Bool[np.ndarray, "B T J"]) -> float:
    """The share of a token's units that the token before it used too; random ones of density r
    share r."""
    both = (selected[:, 1:] & selected[:, :-1]).sum()
    return float(both / max(selected[:, 1:].sum(), 1))


def judged(cfg: ModelConfig, params: Params, tokens: Int[np.ndarray, "B T"]) -> list[Json | None]:
    """For every layer with a selector, None for others: the density, the `recall` of the neurons
    that matter, and the share of the contributions (a hidden value's magnitude times the norm of
    its row of `down`) that is kept, `mass`.

    In a ReLU block without a gate those that matter are the active ones (arXiv 2310.17157, section
    5.2); else the equally many with the largest contributions. A random selection recalls its
    density.
    """
    found = watch_layers(cfg, params, jnp.asarray(tokens), _judgement)
    return [
        None if one is None else {name: float(value) for name, value in one.items()}
        for one in found
    ]


def _selection(cfg: ModelConfig, layer: Params, x: Array, sites: Sequence[Array]) -> Array:
    block = layer["mlp"]
    if isinstance(block, SparseMlp):
        return block.selector(sites).reshape(*x.shape[:-1], -1)
    if isinstance(block, MaskedMlp):
        return block.selected(cfg, x)
    return jnp.ones((*x.shape[:-1], 1), bool)


def _judgement(
    cfg: ModelConfig, layer: Params, x: Array, sites: Sequence[Array]
) -> dict[str, Array] | None:
    block = layer["mlp"]
    if not isinstance(block, SparseMlp):
        return None
    selected = jnp.repeat(block.selector(sites), block.block_size, axis=1)
    w = block.weights
    hidden = hidden_values(w, x.reshape(-1, x.shape[-1]), cfg.activation)
    down = w.down.astype(jnp.float32)
    down = down if w.down_scale is None else down * w.down_scale
    norms = jnp.linalg.norm(down, axis=1)
    norms = norms if w.hidden_scale is None else norms * w.hidden_scale
    mass = jnp.abs(hidden) * norms
    if cfg.activation == "relu" and w.gate is None:
        matters = hidden > 0
    else:
        places = mass.shape[1] - selected.sum(axis=1, keepdims=True)
        ordered = jnp.pad(jnp.sort(mass, axis=1), ((0, 0), (0, 1)), constant_values=jnp.inf)
        matters = mass >= jnp.take_along_axis(ordered, places, axis=1)
    return {
        "density": selected.mean(dtype=jnp.float32),
        "recall": (selected & matters).sum() / jnp.maximum(matters.sum(), 1),
        "mass": jnp.where(selected, mass, 0).sum() / jnp.maximum(mass.sum(), 1e-30),
    }
