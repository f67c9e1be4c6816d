"""Tensor parallelism: one stage's layers divided between several devices.

Every device has whole groups of heads (a key/value head with the queries that share it), a part of
the feed-forward width and a part of the vocabulary, and keeps the cache of its own heads. A layer
adds up twice, behind `out` and behind `down`, a parallel block once (arXiv 1909.08053, section 3);
caches never move. A degree that does not divide is no obstacle: groups of heads and widths are
filled up with zeros, which put out zeros, so that 3 key/value heads serve on 2 or 4 devices.

The program of a device is the one that runs alone, inside `jax.shard_map`, with `Backend.axis`
naming the devices: kernels, caches and scatters see their own part and nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.arguments import whole
from jaxinfer.cache.policy import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.models.mixers import mixer_of
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import Int8Weight, StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params

AXIS = "tp"
BY_OUTPUTS = ("q", "k", "v", "sink", "gate", "up", "tokens", "head")
BY_INPUTS = ("out", "down")


def mesh_of(degree: int, first: int = 0) -> Mesh:
    """The devices of one stage: `degree` of this process's, from number `first` on.

    Raises:
        ValueError: there are not so many.
    """
    found = jax.devices()
    first, degree = whole("first", first, least=0), whole("degree", degree)
    if first + degree > len(found):
        raise ValueError(
            f"a stage of {degree} devices from number {first} on needs {first + degree}, this "
            f"process has {len(found)}; a CPU has as many as XLA_FLAGS="
            "--xla_force_host_platform_device_count says"
        )
    return Mesh(np.asarray(found[first : first + degree]), (AXIS,))


def padded_config(cfg: ModelConfig, degree: int) -> ModelConfig:
    """The configuration with groups of heads and feed-forward width that `degree` divides."""
    groups = _multiple(cfg.num_kv_heads, degree)
    heads, slopes = groups * cfg.group_size, cfg.alibi_slopes
    return replace(
        cfg,
        num_kv_heads=groups,
        num_heads=heads,
        intermediate_size=_multiple(cfg.intermediate_size, degree),
        alibi_slopes=None if slopes is None else slopes + (0.0,) * (heads - cfg.num_heads),
    )


def check_divisible(cfg: ModelConfig, params: Params, backend: Backend) -> None:
    """Refuses what cannot be divided between devices.

    Raises:
        ValueError: blocks that select what they compute, weights of 4 bits, or ALiBi in kernels.
    """
    for layer in params["layers"]:
        name, _ = mixer_of(layer)
        if isinstance(layer["mlp"], FeedForward) or "heads" in layer[name]:
            raise ValueError(
                "a stage of several devices computes whole blocks; load the model without sparsity"
            )
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, StoredWeight))
    if any(isinstance(x, StoredWeight) and not isinstance(x, Int8Weight) for x in leaves):
        raise ValueError(
            "weights of 4 bits, or packed for a GPU's kernel, serve on one device; load them with "
            "weights='int8' on a CPU or without weights"
        )
    if cfg.alibi_slopes is not None and backend.has_kernels:
        raise ValueError(
            "the kernels have ALiBi's slopes compiled in, which differ between the devices of a "
            "stage; use implementation='reference'"
        )


def shard_params(cfg: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """The parameters, or a stage's part of them, filled up and divided between the devices.

    Args:
        cfg: their configuration, not padded.
        params: the tree of `jaxinfer.models.params`; the ends may be missing.
        mesh: of `mesh_of`.
    """
    wide = padded_config(cfg, mesh.size)
    heads, groups, width = wide.num_heads * cfg.head_dim, wide.num_kv_heads, wide.intermediate_size
    words = _multiple(cfg.vocab_size, mesh.size)
    sizes = {"q": heads, "k": groups * cfg.head_dim, "v": groups * cfg.head_dim, "out": heads}
    sizes |= {"gate": width, "up": width, "down": width, "tokens": words, "head": words}
    sizes["sink"] = wide.num_heads

    def place(path: tuple[Any, ...], leaf: Leaf) -> Leaf:
        axis, name = _division(path)
        if axis is None:
            return jax.device_put(leaf, NamedSharding(mesh, P()))
        if name == "cache":  # feature maps, some per group and some per head
            return _divided(leaf, 0, len(leaf) // cfg.num_kv_heads * groups, mesh)
        if name in BY_INPUTS and axis == 0:  # a bias, which must count once
            return _divided(leaf, 0, len(leaf) * mesh.size, mesh)
        return _divided(leaf, axis, sizes[name], mesh)

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=_is_stored)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function on every device of a mesh.

    It takes parameters that `shard_params` placed, a cache, and arrays that every device has whole,
    and returns a cache and such an array. On a mesh of one device nothing is changed.
    """
    if mesh.size == 1:
        return function

    def divided(params: Params, cache: Cache, *rest: Leaf) -> Any:
        caches = cache_specs(params, cache)
        specs = param_specs(params), caches, *(P() for _ in rest)
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=(caches, P()), check_vma=False
        )(params, cache, *rest)

    return divided


def param_specs(params: Params) -> Any:
    """How `shard_params` divides each leaf."""

    def spec(path: tuple[Any, ...], leaf: Leaf) -> Any:
        axis, _ = _division(path)
        return jax.tree.map(lambda _: P(), leaf) if axis is None else _parts(leaf, axis)

    return jax.tree_util.tree_map_with_path(spec, params, is_leaf=_is_stored)


def cache_specs(params: Params, cache: Cache) -> Any:
    """How a cache is divided: states of attention have the row first and the group of heads second,
    those of other mixers are whole on every device."""

    def specs(layer: Params, state: Leaf) -> Any:
        divides = mixer_of(layer)[1].divides
        return jax.tree.map(lambda x: P(None, AXIS) if divides and x.ndim > 1 else P(), state)

    layers = tuple(map(specs, params["layers"], cache.layers))
    return replace(jax.tree.map(lambda _: P(), cache), layers=layers)


def place_cache(params: Params, cache: Cache, mesh: Mesh) -> Cache:
    """A cache of the padded configuration, on its devices."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(params, cache))
    return jax.device_put(cache, shardings)


def _division(path: tuple[Any, ...]) -> tuple[int | None, str]:
    """The axis along which a leaf (of a weight [O, I]) is divided, None if it is whole on every
    device; and what it belongs to."""
    names = [getattr(entry, "key", "") for entry in path]
    if names[0] == "layers" and not {"attn", "mlp"} & set(names):
        return None, ""
    if "cache" in names:
        return 0, "cache"
    name = next((name for name in reversed(names) if name in BY_OUTPUTS + BY_INPUTS), "")
    if not name:
        return None, ""
    return (1 if name in BY_INPUTS and names[-1] != "bias" else 0), name


def _is_stored(leaf: Leaf) -> bool:
    return isinstance(leaf, StoredWeight)


def _multiple(size: int, degree: int) -> int:
    return math.ceil(size / degree) * degree


def _divided(leaf: Leaf, axis: int, size: int, mesh: Mesh) -> Leaf:
    """The leaf, filled up to `size` along an axis of which each device has a part."""
    specs = _parts(leaf, axis)
    if not isinstance(leaf, Int8Weight):
        return jax.device_put(_filled(leaf, axis, size), NamedSharding(mesh, specs))
    new = replace(
        leaf,
        codes=_filled(leaf.codes, axis, size),
        scale=_filled(leaf.scale, 0, size) if axis == 0 else leaf.scale,
        smooth=leaf.smooth
        if axis == 0 or leaf.smooth is None
        else _filled(leaf.smooth, 0, size, 1),
        axis=AXIS if axis == 1 and mesh.size > 1 else None,
    )
    specs = replace(specs, axis=new.axis)
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), new, specs)


def _parts(leaf: Leaf, axis: int) -> Any:
    """The partition of a leaf along an axis of a weight [O, I]."""
    if not isinstance(leaf, Int8Weight):
        return P(*[None] * axis, AXIS)
    inputs = P() if axis == 0 else P(AXIS)
    return replace(
        leaf,
        codes=P(*[None] * axis, AXIS),
        scale=P(AXIS) if axis == 0 else P(),
        smooth=None if leaf.smooth is None else inputs,
    )


def _filled(x: Leaf, axis: int, size: int, value: float = 0) -> Leaf:
    more = size - x.shape[axis]
    if not more:
        return x
    widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
