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
                                                   another mixer has its own name and parameters
    LINEAR: {"weight": [outputs, inputs], "bias": [outputs]?}
    NORM: {"scale": [D], "bias": [D]?, "divisor": [D]?}   the last of 8-bit models, already divided

Layers are a tuple of dictionaries, one array per layer: slicing stacked weights in a compiled
decode step copies them (design notes in the README).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxinfer.config import ModelConfig
from jaxinfer.models.mixers import mixer_named, mixer_of
from jaxinfer.models.shapes import abstract_linear, abstract_norm
from jaxinfer.typing import Leaf, Params

FILTERS = frozenset(("filter", "modal", "short", "skip"))
"""Parts of a mixer whose leaves are float32 in a model of any dtype."""


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
    return params | {name: mixer_named(name).abstract_params(cfg, layer, dtype), "mlp": mlp}


def is_weight(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a path is a matrix that activations are multiplied with, or an embedding
    that may be one."""
    return getattr(path[-1], "key", None) in ("weight", "tokens")


def is_filter(name: str) -> bool:
    """Whether the leaf of this name (`leaf_name`) is of a filter: poles, residues, skips, taps and
    what implicit filters are made of. No cast and no rounding touches them: rounded to bfloat16 a
    pole leaves the unit circle."""
    return not FILTERS.isdisjoint(name.split("."))


def stays(name: str) -> bool:
    """Whether the leaf of this name is no weight, so that no cast of the model concerns it."""
    return is_filter(name) or "selector" in name.split(".")


def cast_params(params: Params, dtype: DTypeLike) -> Params:
    """The parameters with all floating ones in `dtype` that do not stay as they are."""

    def one(path: tuple[Any, ...], leaf: Leaf) -> Leaf:
        is_cast = jnp.issubdtype(leaf.dtype, jnp.floating) and not stays(leaf_name(path))
        return leaf.astype(dtype) if is_cast else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def init_params(cfg: ModelConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters: weights N(0, 1 / inputs), residual outputs scaled by 1 / sqrt(2 L);
    mixers may start some of theirs otherwise."""
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

    params = jax.tree_util.tree_unflatten(
        tree, [init(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]
    )
    layers = []
    for i, (layer, own) in enumerate(
        zip(params["layers"], jax.random.split(keys[0], cfg.num_layers), strict=True)
    ):
        name = cfg.mixer(i)
        layers.append(layer | {name: mixer_named(name).initialised(cfg, layer[name], own)})
    return params | {"layers": tuple(layers)}


def served_params(cfg: ModelConfig, params: Params) -> Params:
    """The parameters as decoding reads them (`Mixer.served`); doing it again changes nothing."""
    layers = []
    for layer in params.get("layers", ()):
        name, mixer = mixer_of(layer)
        served = mixer.served(cfg, layer[name])
        layers.append(layer if served is layer[name] else layer | {name: served})
    same = all(new is old for new, old in zip(layers, params.get("layers", ()), strict=True))
    return params if same else params | {"layers": tuple(layers)}


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
