"""What the blocks and weights of a model see while it reads a text, noted where they compute it.

Axis letters: B rows of a batch, T tokens, I inputs of a weight.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.models.params import is_weight
from jaxinfer.models.stack import forward
from jaxinfer.nn.linear import product, rows
from jaxinfer.nn.mlp import FeedForward, feed_forward
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params

OfLayer = Callable[[ModelConfig, Params, Array, Sequence[Array]], Any]
"""Called with a layer's parameters, and x and sites of its feed-forward block as in
`FeedForward.__call__`."""

OfInput = Callable[[Any, Array], Any]
"""Called with a weight and the activations that it multiplies."""

WeightName = tuple[str | int, ...]
"""(layer, "attn" or "mlp", "q" and so on)."""


def watch_layers(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"], of: OfLayer
) -> tuple[Leaf, ...]:
    """What `of` returns for every layer while the model reads `tokens`; it is a function of a
    module, as it is part of what the program is compiled for."""
    return _watch_layers(cfg, params, tokens, of)


def watch_inputs(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"], of: OfInput
) -> dict[WeightName, Leaf]:
    """What `of` returns for every weight of the layers."""
    return _watch_inputs(cfg, params, tokens, of)


def layer_weights(params: Params) -> dict[WeightName, Leaf]:
    """The weights of attention and feed-forward blocks that are matrices or stand for one."""
    found = jax.tree_util.tree_leaves_with_path(params["layers"], is_leaf=_is_stored)
    return {_name(path): leaf for path, leaf in found if is_weight(path)}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _watch_layers(cfg: ModelConfig, params: Params, tokens: Array, of: OfLayer) -> tuple:
    seen: dict[int, Any] = {}
    layers = tuple(
        layer | {"mlp": _WatchedBlock(layer=layer, index=index, of=of, seen=seen)}
        for index, layer in enumerate(params["layers"])
    )
    forward(cfg, params | {"layers": layers}, tokens, logits="none")
    return tuple(seen[index] for index in range(len(layers)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _watch_inputs(cfg: ModelConfig, params: Params, tokens: Array, of: OfInput) -> dict:
    seen: dict[WeightName, Any] = {}

    def watched(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_weight(path):
            return leaf
        return _WatchedWeight(
            weight=leaf, name=_name(path), of=of, seen=seen, dtype=str(leaf.dtype), origin=""
        )

    layers = jax.tree_util.tree_map_with_path(watched, params["layers"], is_leaf=_is_stored)
    forward(cfg, params | {"layers": layers}, tokens, logits="none")
    return seen


def _name(path: tuple[Any, ...]) -> WeightName:
    """Without the names of what may stand around a block's parameters."""
    keys = [getattr(entry, "key", getattr(entry, "idx", None)) for entry in path[:-1]]
    return tuple(key for key in keys if key is not None)


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, StoredWeight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _WatchedBlock(FeedForward):
    layer: Params
    index: int = field(metadata={"static": True})
    of: OfLayer = field(metadata={"static": True})
    seen: dict[int, Any] = field(metadata={"static": True})

    def __call__(
        self,
        cfg: ModelConfig,
        x: Float[Array, "B T D"],
        sites: Sequence[Array] = (),
        backend: Backend | None = None,
    ) -> Float[Array, "B T D"]:
        self.seen[self.index] = self.of(cfg, self.layer, x, sites)
        return feed_forward(cfg, self.layer["mlp"], x, self.index, backend, sites)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _WatchedWeight(StoredWeight):
    weight: Any
    name: WeightName = field(metadata={"static": True})
    of: OfInput = field(metadata={"static": True})
    seen: dict[WeightName, Any] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def product(
        self, x: Float[Array, "... I"], backend: Backend | None = None
    ) -> Float[Array, "... O"]:
        self.seen[self.name] = self.of(self.weight, x)
        return product(x, self.weight, "float32", backend)

    def rows(self, indices: Int[Array, "..."]) -> Float[Array, "... I"]:
        return rows(self.weight, indices)
