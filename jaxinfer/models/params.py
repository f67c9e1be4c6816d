"""The parameter tree of a `ModelConfig`: its shapes, and a random initialisation.

    {"embed": {"tokens": [V, D], "positions": [P, D]?},
     "layers": (LAYER, ...),
     "final_norm": NORM,
     "head": {"weight": [V, D], "bias": [V]?}}     absent when tied: then embed.tokens serves
    LAYER: {"attn_norm": NORM,                     before the mixer, whatever it is
            "attn": {"q": LINEAR D -> N*H, "k", "v": LINEAR D -> K*H, "out": LINEAR N*H -> D,
                     "q_norm", "k_norm": {"scale": [H]}?},
            "mlp_norm": NORM,                      absent when `shared_norm`
            "mlp": {"gate": LINEAR D -> F?, "up": LINEAR D -> F, "down": LINEAR F -> D}}
                                                   or a `jaxinfer.nn.mlp.FeedForward`
    LINEAR: {"weight": [outputs, inputs], "bias": [outputs]?}
    NORM: {"scale": [D], "bias": [D]?, "divisor": [D]?}   the last of 8-bit models, already divided

Layers are a tuple of dictionaries, one array per layer: slicing stacked weights in a compiled
decode step copies them (design notes in the README).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.models.mixers import mixer_named
from jaxinfer.models.shapes import abstract_linear, abstract_norm
from jaxinfer.typing import Leaf, Params


def abstract_params(cfg: ModelConfig, dtype=jnp.float32) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves."""
    d = cfg.hidden_size
    embed = {"tokens": jax.ShapeDtypeStruct((cfg.vocab_size, d), dtype)}
    if cfg.positions == "learned":
        shape = (cfg.max_positions + cfg.position_offset, d)
        embed["positions"] = jax.ShapeDtypeStruct(shape, dtype)
    params = {
        "embed": embed,
        "layers": tuple(_abstract_layer(cfg, i, dtype) for i in range(cfg.num_layers)),
        "final_norm": abstract_norm(d, cfg.norm_bias, dtype),
    }
    if not cfg.tie_embeddings:
        params["head"] = abstract_linear(d, cfg.vocab_size, cfg.head_bias, dtype)
    return params


def _abstract_layer(cfg: ModelConfig, layer: int, dtype) -> Params:
    d, f, name = cfg.hidden_size, cfg.intermediate_size, cfg.mixer(layer)
    mlp = {
        "up": abstract_linear(d, f, cfg.mlp_bias, dtype),
        "down": abstract_linear(f, d, cfg.mlp_bias, dtype),
    }
    if cfg.mlp(layer) == "gated":
        mlp["gate"] = abstract_linear(d, f, cfg.mlp_bias, dtype)
    params = {"attn_norm": abstract_norm(d, cfg.norm_bias, dtype)}
    if not cfg.shared_norm:
        params["mlp_norm"] = abstract_norm(d, cfg.norm_bias, dtype)
    return params | {name: mixer_named(name).abstract_params(cfg, dtype), "mlp": mlp}


def is_weight(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a path is a matrix that activations are multiplied with, or an embedding
    that may be one."""
    return getattr(path[-1], "key", None) in ("weight", "tokens")


def init_params(cfg: ModelConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters: weights N(0, 1 / inputs), residual outputs scaled by 1 / sqrt(2 L)."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(cfg, dtype))
    keys = jax.random.split(key, len(leaves))

    def init(path, leaf, key):
        names = [getattr(entry, "key", None) for entry in path]
        if names[-1] == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        if names[-1] in ("bias", "sink"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        deviation = 0.02 if names[0] == "embed" else leaf.shape[-1] ** -0.5
        if names[-2] in ("out", "down"):
            deviation /= math.sqrt(2 * cfg.num_layers)
        return (deviation * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype)

    return jax.tree_util.tree_unflatten(
        tree, [init(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]
    )


def count_params(cfg: ModelConfig) -> int:
    """Number of parameters, tied heads counted once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(cfg)))


def leaf_path(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    """The keys and indices of a path as `jax.tree_util` gives it."""
    return tuple(entry.key if hasattr(entry, "key") else entry.idx for entry in path)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The path joined by dots, as files name arrays."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: Any) -> dict[str, Leaf]:
    """The leaves of a tree by `leaf_name`."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
