"""Which arrays a layer's sparsity has, and of which sizes: what its description in a file says.

From a form follow the shapes of all arrays, so that a reader knows them before it reads any.

Axis letters: J units, P rank of a router, F neurons, D width, R rank of the adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.fields import check_types, known_fields
from jaxinfer.models.params import named_leaves
from jaxinfer.sparsity.base import Router, Rule, check_lookahead
from jaxinfer.sparsity.identity import SparsityConfig
from jaxinfer.sparsity.learned import LayerSparsity
from jaxinfer.sparsity.recall import PARTS
from jaxinfer.typing import Json, Leaf, Params

MOST_UNIONS = 16  # of 1, 2, 4, ... 32768 rows


@dataclass(frozen=True, kw_only=True)
class RouterForm:
    """A router without its numbers; `rank` is None where it has no inner matrix."""

    rank: int | None
    bias: bool
    most: int | None
    threshold: float | None
    lookahead: float | None

    def __post_init__(self):
        check_types(self)
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"the rank of a router must be positive, got {self.rank}")
        if self.lookahead is not None:
            check_lookahead(self.lookahead)
        self.rule()

    @classmethod
    def of(cls, router: Router) -> "RouterForm":
        if type(router) is not Router:
            raise ValueError(f"a {type(router).__name__} has no form in a file; give a Router")
        return cls(
            rank=None if router.inner is None else router.inner.shape[0],
            bias=router.bias is not None,
            most=router.rule.most,
            threshold=router.rule.threshold,
            lookahead=router.lookahead,
        )

    def rule(self) -> Rule:
        return Rule(most=self.most, threshold=self.threshold)

    def abstract(self, units: int, width: int) -> Router:
        """The router of `units` units that reads `width` numbers, with shapes for arrays."""
        if self.most is not None and self.most > units:
            raise ValueError(f"a router selects {self.most} of {units} units; give at most {units}")
        inner = None if self.rank is None else _floats(self.rank, width)
        return Router(
            outer=_floats(units, width if self.rank is None else self.rank),
            inner=inner,
            bias=_floats(units) if self.bias else None,
            rule=self.rule(),
            lookahead=None if self.lookahead is None else float(self.lookahead),
        )


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """What a layer has: a router of its blocks of neurons, one of its groups of heads, another
    order of its neurons, new weights (with biases), low-rank adapters of one rank."""

    router: RouterForm | None
    heads: RouterForm | None
    permuted: bool
    new_weights: bool
    new_biases: bool
    adapters: int | None
    unions: tuple[float, ...]
    recalls: tuple[float, ...] = ()

    def __post_init__(self):
        check_types(self)
        if self.router is None and self.heads is None:
            raise ValueError("a layer without a router is dense: give None in its place")
        if self.new_weights and (self.permuted or self.adapters is not None):
            raise ValueError(
                "new weights stand in the stored order already; a layer has either them, or a "
                "permutation and adapters of the model's own"
            )
        if self.new_biases and not self.new_weights:
            raise ValueError("new biases come with new weights")
        if self.router is None and (self.permuted or self.new_weights or self.adapters):
            raise ValueError("a layer whose block stays dense keeps its weights as they are")
        if self.adapters is not None and self.adapters < 1:
            raise ValueError(f"the rank of adapters must be positive, got {self.adapters}")
        check_unions(self.unions)
        if self.recalls and (len(self.recalls) != PARTS or not _rising(self.recalls)):
            raise ValueError(f"recalls are {PARTS} shares from 0 to 1 that do not fall, or none")

    @classmethod
    def of(cls, layer: LayerSparsity) -> "LayerForm":
        mlp, adapters = layer.mlp, layer.adapters
        return cls(
            router=None if layer.router is None else RouterForm.of(layer.router),
            heads=None if layer.heads is None else RouterForm.of(layer.heads),
            permuted=layer.permutation is not None,
            new_weights=mlp is not None,
            new_biases=mlp is not None and "bias" in mlp["up"],
            adapters=None if adapters is None else len(adapters["up"]["left"]),
            unions=layer.unions,
            recalls=layer.recalls,
        )

    @classmethod
    def from_dict(cls, data: Json) -> "LayerForm":
        """The form that `dataclasses.asdict` has made an object of; ValueError for any other."""
        return cls(**known_fields(cls, data))

    def abstract(self, config: SparsityConfig) -> LayerSparsity:
        """The layer with `jax.ShapeDtypeStruct` leaves."""
        neurons, width = config.intermediate_size, config.hidden_size
        router, heads = self.router, self.heads
        return LayerSparsity(
            router=None if router is None else router.abstract(config.blocks, width),
            heads=None if heads is None else heads.abstract(config.num_kv_heads, width),
            permutation=jax.ShapeDtypeStruct((neurons,), jnp.int32) if self.permuted else None,
            mlp=self._mlp(config) if self.new_weights else None,
            adapters=None if self.adapters is None else self._adapters(config, self.adapters),
            unions=tuple(map(float, self.unions)),
            recalls=tuple(map(float, self.recalls)),
        )

    def _mlp(self, config: SparsityConfig) -> Params:
        return {
            name: {"weight": _floats(*shape)}
            | ({"bias": _floats(shape[0])} if self.new_biases else {})
            for name, shape in config.matrices().items()
        }

    def _adapters(self, config: SparsityConfig, rank: int) -> Params:
        return {
            name: {"left": _floats(rank, outputs), "right": _floats(rank, inputs)}
            for name, (outputs, inputs) in config.matrices().items()
        }


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def check_unions(unions: Sequence[float]) -> None:
    """Refuses what cannot be the shares of blocks that 1, 2, 4, ... tokens use together."""
    if len(unions) > MOST_UNIONS or not _rising(unions):
        raise ValueError(f"unions are at most {MOST_UNIONS} shares from 0 to 1 that do not fall")


def _rising(shares: Sequence[float]) -> bool:
    """From 0 to 1, none below the one before."""
    return all(a <= b for a, b in zip((0.0, *shares), (*shares, 1.0), strict=True))


def check_layer(layer: LayerSparsity, config: SparsityConfig) -> None:
    """Refuses arrays of other shapes than the config gives, or that make no sense."""
    ours, wanted = (jax.tree.map(_shape, x) for x in (layer, LayerForm.of(layer).abstract(config)))
    pairs = zip(named_leaves(ours).items(), named_leaves(wanted).items(), strict=False)
    wrong = next((f"{' '.join(a)} instead of {' '.join(b)}" for a, b in pairs if a != b), None)
    if wrong is not None or jax.tree.structure(ours) != jax.tree.structure(wanted):
        raise ValueError(f"has {wrong or 'an array too many or too few'}")
    if layer.router is not None and layer.router.lookahead not in (0.0, config.lookahead):
        raise ValueError(
            f"has a router with look-ahead {layer.router.lookahead}, where the config says "
            f"{config.lookahead}"
        )
    if layer.permutation is not None:
        order = np.sort(np.asarray(layer.permutation))
        if not np.array_equal(order, np.arange(len(order))):
            raise ValueError(f"has a permutation that is none of 0 to {len(order) - 1}")
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(layer)):
        raise ValueError("has numbers that are not finite")


def _shape(leaf: Leaf) -> str:
    return f"{leaf.dtype.name}{list(leaf.shape)}"
