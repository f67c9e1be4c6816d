"""What a sparse model reads and multiplies for a token, beside the dense one: the two axes on which
methods are compared.

Counted are the weights of attention and feed-forward blocks and what selects among them, for one
token at a time; not the head, the embeddings, the norms and the cache. A density is measured on a
text, as thresholds promise none. What a method needs to choose counts where an implementation reads
it: a router; CATS's gate in full; WINA's norms. An oracle counts as if it chose for nothing, since
it is a bound, and GRIFFIN's prompt is not counted.

Axis letters: B rows of a text, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer.config import ModelConfig
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import size_of
from jaxinfer.sparsity.inputs import SparseInputs
from jaxinfer.sparsity.masked import ChosenByPrompt, MaskedMlp
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.sparsity.observe import WeightName, layer_weights, watch_inputs, watch_layers
from jaxinfer.typing import Params


class Work(NamedTuple):
    """For one token: bytes of parameters that are read, and products of two numbers."""

    bytes: float
    products: float

    def plus(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.products + other.products)


@dataclass(frozen=True)
class Densities:
    """What a text used: the share of the neurons per feed-forward block, of the inputs per weight
    whose inputs are sparse, and of the groups of heads per layer (all where there is no entry)."""

    blocks: tuple[float, ...]
    inputs: Mapping[WeightName, float] = field(default_factory=dict)
    heads: tuple[float, ...] = ()


@dataclass(frozen=True)
class Shares:
    """Bytes and products as shares of the dense model's: of the feed-forward blocks, and of these
    with attention."""

    mlp_bytes: float
    mlp_products: float
    layer_bytes: float
    layer_products: float


def measure(cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Densities:
    """The densities on a text that the model reads as it serves it, every token sparse."""
    found = watch_layers(cfg, params, tokens, _layer_densities)
    blocks, heads = zip(*((float(block), float(heads)) for block, heads in found), strict=True)
    sparse = [w for w in layer_weights(params).values() if isinstance(w, SparseInputs)]
    inputs = watch_inputs(cfg, params, tokens, _input_density) if sparse else {}
    return Densities(blocks, {name: float(share) for name, share in inputs.items()}, heads)


def shares(dense: Params, sparse: Params, densities: Densities) -> Shares:
    """What the model `sparse` reads and multiplies, beside `dense`, of which it was made."""
    mlp, whole_mlp, attn, whole_attn = (Work(0, 0),) * 4
    pairs = zip(dense["layers"], sparse["layers"], strict=True)
    for index, (old, new) in enumerate(pairs):
        inputs = {name[1:]: x for name, x in densities.inputs.items() if name[0] == index}
        mlp = mlp.plus(block_work(new["mlp"], densities.blocks[index], _of("mlp", inputs)))
        whole_mlp = whole_mlp.plus(block_work(old["mlp"], 1.0))
        if "attn" in new:
            heads = densities.heads[index] if densities.heads else 1.0
            attn = attn.plus(attention_work(new["attn"], heads, _of("attn", inputs)))
            whole_attn = whole_attn.plus(block_work(old["attn"], 1.0))
    layer, whole = mlp.plus(attn), whole_mlp.plus(whole_attn)
    return Shares(
        mlp_bytes=mlp.bytes / whole_mlp.bytes,
        mlp_products=mlp.products / whole_mlp.products,
        layer_bytes=layer.bytes / whole.bytes,
        layer_products=layer.products / whole.products,
    )


def block_work(
    block: Params | FeedForward, density: float, inputs: Mapping[str, float] | None = None
) -> Work:
    """One block's work per token, if it uses the share `density` of its neurons and of a weight's
    inputs those in `inputs` (all where there is none).

    Raises:
      ValueError: for a block of a kind that nobody has counted.
    """
    if isinstance(block, SparseMlp):
        return _selected(block, density)
    if isinstance(block, MaskedMlp):
        return _masked(block, density)
    if isinstance(block, FeedForward):
        raise ValueError(f"there is no account of what a {type(block).__name__} reads")
    total = Work(0, 0)
    for name, part in block.items():
        if isinstance(part, Mapping) and "weight" in part:
            share = (inputs or {}).get(name, 1.0)
            total = total.plus(_weight(part["weight"], share)).plus(_bias(part))
    return total


def attention_work(
    attention: Params, heads: float, inputs: Mapping[str, float] | None = None
) -> Work:
    """The projections' work per token that uses the share `heads` of the groups of heads: of
    queries and outputs that share, of keys and values all, as they are made with the token or
    later."""
    if "heads" not in attention:
        return block_work(attention, 1.0, inputs)
    total = _own(attention["heads"])
    for name in ("q", "k", "v", "out"):
        share = heads if name in ("q", "out") else 1.0
        part = attention[name]
        total = total.plus(_weight(part["weight"], share)).plus(_bias(part, share))
    return total


def _selected(block: SparseMlp, density: float) -> Work:
    w, selector = block.weights, block.selector
    every = [leaf for leaf in (w.down_bias, w.down_scale) if leaf is not None]
    fixed = sum(leaf.nbytes for leaf in every)
    matrices = [leaf for leaf in (w.up, w.gate, w.down) if leaf is not None]
    read = density * (_nbytes(w) - fixed) + fixed
    return Work(read, density * size_of(matrices)).plus(_own(selector))


def _own(selector: Any) -> Work:
    """What choosing itself reads and multiplies."""
    leaves = [x for x in jax.tree.leaves(selector) if jnp.issubdtype(x.dtype, jnp.floating)]
    return Work(_nbytes(leaves), size_of(leaves))


def _masked(block: MaskedMlp, density: float) -> Work:
    in_full, total = block.criterion.in_full(block.dense), Work(0, 0)
    for name, part in block.dense.items():
        share = 1.0 if name in in_full else density
        total = total.plus(_weight(part["weight"], share))
        total = total.plus(_bias(part, 1.0 if name == "down" else share))
    return total


def _weight(weight: Any, share: float) -> Work:
    if not isinstance(weight, SparseInputs):
        return Work(share * _nbytes(weight), share * math.prod(weight.shape))
    norms = 0 if weight.norms is None else weight.norms.size
    inner = _weight(weight.weight, share)
    return inner.plus(Work(_nbytes(weight.norms), norms))


def _bias(part: Mapping[str, Any], share: float = 1.0) -> Work:
    return Work(share * part["bias"].nbytes, 0) if "bias" in part else Work(0, 0)


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _of(block: str, inputs: Mapping[tuple, float]) -> dict[str, float]:
    return {name[1]: share for name, share in inputs.items() if name[0] == block}


def _layer_densities(
    cfg: ModelConfig, layer: Params, x: Array, sites: Sequence[Array]
) -> tuple[Array, Array]:
    heads = layer.get("attn", {}).get("heads")
    share = jnp.float32(1) if heads is None else heads(sites[:-1]).mean(dtype=jnp.float32)
    return _block_density(cfg, layer["mlp"], x, sites), share


def _block_density(cfg: ModelConfig, block: Any, x: Array, sites: Sequence[Array]) -> Array:
    if isinstance(block, SparseMlp):
        return block.selector(sites).mean(dtype=jnp.float32)
    if not isinstance(block, MaskedMlp):
        return jnp.float32(1)
    selected = block.selected(cfg, x)
    if isinstance(block.criterion, ChosenByPrompt):
        selected = selected[:, block.criterion.prompt(selected.shape[1]) :]
    return selected.mean(dtype=jnp.float32)


def _input_density(weight: Any, x: Array) -> Array:
    if not isinstance(weight, SparseInputs):
        return jnp.float32(1)
    return weight.kept(x).mean(dtype=jnp.float32)
