"""Part of a model: some layers that follow each other, with the end that they touch.

The first layer comes with the embedding, the last one with the final norm and the head, which is
the embedding once more where both are tied.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxinfer.config import ModelConfig
from jaxinfer.typing import Leaf, Params


def check_layers(cfg: ModelConfig, layers: range) -> None:
    """Refuses layers that the model does not have; none at all are allowed."""
    if layers.step != 1 or not 0 <= layers.start <= layers.stop <= cfg.num_layers:
        raise ValueError(
            f"layers must be a range within the {cfg.num_layers} of the model, got {layers}"
        )


def ends_of(cfg: ModelConfig, layers: range) -> tuple[bool, bool]:
    """Whether the layers begin the model, and whether they end it."""
    return layers.start == 0 < layers.stop, layers.start < layers.stop == cfg.num_layers


def part_of(cfg: ModelConfig, params: Params, layers: range) -> Params:
    """Of a tree that has the form of a model's parameters, what these layers need; the others are
    left out, so that the part's layers count from 0.

    Raises:
      ValueError: the model has no such layers.
    """
    check_layers(cfg, layers)
    is_first, is_last = ends_of(cfg, layers)
    part: Params = {"layers": params["layers"][layers.start : layers.stop]}
    embed = {}
    if is_first:
        embed |= params["embed"]
    if is_last:
        part["final_norm"] = params["final_norm"]
        if cfg.tie_embeddings:
            embed["tokens"] = params["embed"]["tokens"]
        else:
            part["head"] = params["head"]
    if embed:
        part["embed"] = embed
    return part


def leaves_of_part(
    cfg: ModelConfig, params: Params, layers: range
) -> tuple[list[int], Callable[[list[Leaf]], Any]]:
    """Which leaves of the whole tree, in its order, belong to the part; and what makes the part of
    them."""
    leaves, tree = jax.tree.flatten(params)
    numbered = jax.tree.unflatten(tree, range(len(leaves)))
    kept, part = jax.tree.flatten(part_of(cfg, numbered, layers))
    order = sorted(kept)
    places = [order.index(number) for number in kept]
    return order, lambda found: jax.tree.unflatten(part, [found[place] for place in places])
