"""How the sparse parts of a model are described in its folder: so that, with the model's config,
the shapes of all arrays are known before any is read.

A description is JSON: for each layer of a sparse model None, or an object with a `BlockForm` as
"mlp", a `HeadsForm` as "heads", or both.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig
from jaxinfer.fields import check_types, known_fields
from jaxinfer.files import quoted
from jaxinfer.nn.block_mlp import BlockWeights
from jaxinfer.nn.heads import Heads, Keys
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Router, Selector, Static
from jaxinfer.sparsity.form import RouterForm, check_unions
from jaxinfer.sparsity.heads import SparseHeads, with_heads
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Json, Params

Scale = Literal["up_scale", "gate_scale", "hidden_scale", "down_scale"]
SCALES: tuple[Scale, ...] = get_args(Scale)
"""Of 8-bit codes, as `BlockWeights` names them."""


@dataclass(frozen=True, kw_only=True)
class SelectorForm:
    """A selector without its numbers; one without a router is `Static`."""

    units: int
    router: RouterForm | None

    def __post_init__(self):
        check_types(self)
        if self.units < 1:
            raise ValueError(f"a selector has at least 1 unit, got {self.units}")

    @classmethod
    def of(cls, selector: Selector) -> "SelectorForm":
        if type(selector) is Router:
            return cls(units=selector.units, router=RouterForm.of(selector))
        if type(selector) is Static:
            return cls(units=selector.units, router=None)
        raise ValueError(
            f"a selector of kind {type(selector).__name__} has no form in a folder; save the dense "
            "model, and make it sparse when it is loaded"
        )

    def abstract(self, width: int) -> Selector:
        """The selector that reads `width` numbers, with shapes for arrays."""
        if self.router is None:
            return Static(selected=jax.ShapeDtypeStruct((self.units,), jnp.bool_))
        return self.router.abstract(self.units, width)


@dataclass(frozen=True, kw_only=True)
class BlockForm:
    """A `SparseMlp` without its numbers; `scales` are those that its 8-bit codes have."""

    selector: SelectorForm
    unions: tuple[float, ...]
    scales: tuple[Scale, ...]

    def __post_init__(self):
        check_types(self)
        check_unions(self.unions)
        if self.scales and "up_scale" not in self.scales:
            raise ValueError("8-bit codes of a block have an up_scale")

    @classmethod
    def of(cls, block: FeedForward) -> "BlockForm":
        if not isinstance(block, SparseMlp):
            raise ValueError(f"a block of kind {type(block).__name__} has no form in a folder")
        return cls(
            selector=SelectorForm.of(block.selector),
            unions=block.unions,
            scales=tuple(name for name in SCALES if getattr(block.weights, name) is not None),
        )

    @classmethod
    def from_dict(cls, data: Json) -> "BlockForm":
        """The form that `dataclasses.asdict` has made an object of; ValueError for any other."""
        return cls(**known_fields(cls, data))

    def abstract(self, cfg: ModelConfig, dense: Params) -> SparseMlp:
        """The block in place of a dense one, of which `dense` has the shapes."""
        up, units = dense["up"]["weight"], self.selector.units
        if up.shape[0] % units:
            raise ValueError(f"{units} blocks do not divide {up.shape[0]} neurons")
        if self.scales and ("gate" in dense) != ("gate_scale" in self.scales):
            raise ValueError("scales of 8-bit codes are there for matrices that are not")
        codes = jax.ShapeDtypeStruct(up.shape, jnp.int8) if self.scales else up
        gate = dense.get("gate", {})
        sizes = dict.fromkeys(self.scales, up.shape[0])
        if "down_scale" in sizes:
            sizes["down_scale"] = cfg.hidden_size
        weights = BlockWeights(
            up=codes,
            down=codes,
            gate=codes if gate else None,
            up_bias=dense["up"].get("bias"),
            gate_bias=gate.get("bias"),
            down_bias=dense["down"].get("bias"),
            **{name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in sizes.items()},
        )
        selector = self.selector.abstract(cfg.hidden_size)
        return SparseMlp(weights=weights, selector=selector, unions=tuple(map(float, self.unions)))


@dataclass(frozen=True, kw_only=True)
class HeadsForm:
    """`SparseHeads` without their numbers."""

    selector: SelectorForm
    unions: tuple[float, ...]
    keys: Keys

    def __post_init__(self):
        check_types(self)
        check_unions(self.unions)

    @classmethod
    def of(cls, heads: Heads) -> "HeadsForm":
        if not isinstance(heads, SparseHeads):
            raise ValueError(f"heads of kind {type(heads).__name__} have no form in a folder")
        return cls(selector=SelectorForm.of(heads.selector), unions=heads.unions, keys=heads.keys)

    @classmethod
    def from_dict(cls, data: Json) -> "HeadsForm":
        """The form that `dataclasses.asdict` has made an object of; ValueError for any other."""
        return cls(**known_fields(cls, data))

    def abstract(self, cfg: ModelConfig, dense: Params) -> Params:
        """An attention with such heads, given the shapes of one without; as on a CPU, whatever
        machine writes and reads the folder."""
        selector, unions = self.selector.abstract(cfg.hidden_size), tuple(map(float, self.unions))
        heads = SparseHeads.of(cfg, selector, keys=self.keys, unions=unions)
        return jax.eval_shape(partial(with_heads, backend=Backend()), dense, heads)


def described(params: Params) -> list[Json | None] | None:
    """The description of the sparse parts of a model; None of one without.

    Raises:
      ValueError: a part has no form in a folder.
    """
    layers = [_described(layer) for layer in params["layers"]]
    return layers if any(layer is not None for layer in layers) else None


def with_sparse_parts(cfg: ModelConfig, dense: Params, description: object) -> Params:
    """The shapes of a sparse model, given those of the dense one and a description.

    Raises:
      ValueError: the description is none of this model.
    """
    if description is None:
        return dense
    if not isinstance(description, list) or len(description) != cfg.num_layers:
        raise ValueError(
            f"'sparse' must describe {cfg.num_layers} layers, got {quoted(description)}"
        )
    layers = [
        layer if part is None else _layer(cfg, layer, part)
        for layer, part in zip(dense["layers"], description, strict=True)
    ]
    return dense | {"layers": tuple(layers)}


def _described(layer: Params) -> Json | None:
    parts = {}
    if isinstance(layer["mlp"], FeedForward):
        parts["mlp"] = asdict(BlockForm.of(layer["mlp"]))
    if "heads" in layer.get("attn", {}):
        parts["heads"] = asdict(HeadsForm.of(layer["attn"]["heads"]))
    return parts or None


def _layer(cfg: ModelConfig, dense: Params, part: object) -> Params:
    known = {name for name, at in {"mlp": "mlp", "heads": "attn"}.items() if at in dense}
    if not isinstance(part, dict) or not part or not set(part) <= known:
        raise ValueError(
            f"sparse of a layer may be {' and '.join(sorted(known))}, got {quoted(part)}"
        )
    if "mlp" in part:
        dense = dense | {"mlp": BlockForm.from_dict(part["mlp"]).abstract(cfg, dense["mlp"])}
    if "heads" in part:
        dense = dense | {"attn": HeadsForm.from_dict(part["heads"]).abstract(cfg, dense["attn"])}
    return dense
