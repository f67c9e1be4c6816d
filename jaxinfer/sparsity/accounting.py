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
from dataclasses import dataclass
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
from jaxinfer.sparsity.observe import WeightName, layer_weights, watch_blocks, watch_inputs
from jaxinfer.typing import Params


class Work(NamedTuple):
    """For one token: bytes of parameters that are read, and products of two numbers."""

    bytes: float
    products: float

    def plus(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.products + other.products)


@dataclass(frozen=True)
class Densities:
    """What a text used: the share of its neurons per feed-forward block, and the share of its
    inputs per weight whose inputs are sparse."""

    blocks: tuple[float, ...]
    inputs: Mapping[WeightName, float]


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
    blocks = tuple(float(share) for share in watch_blocks(cfg, params, tokens, _block_density))
    sparse = [w for w in layer_weights(params).values() if isinstance(w, SparseInputs)]
    found = watch_inputs(cfg, params, tokens, _input_density) if sparse else {}
    return Densities(blocks, {name: float(share) for name, share in found.items()})


def shares(dense: Params, sparse: Params, densities: Densities) -> Shares:
    """What the model `sparse` reads and multiplies, beside `dense`, of which it was made."""
    mlp, whole_mlp, attn, whole_attn = (Work(0, 0),) * 4
    pairs = zip(dense["layers"], sparse["layers"], strict=True)
    for index, (old, new) in enumerate(pairs):
        inputs = {name[1:]: x for name, x in densities.inputs.items() if name[0] == index}
        mlp = mlp.plus(block_work(new["mlp"], densities.blocks[index], _of("mlp", inputs)))
        whole_mlp = whole_mlp.plus(block_work(old["mlp"], 1.0))
        if "attn" in new:
            attn = attn.plus(block_work(new["attn"], 1.0, _of("attn", inputs)))
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


def _selected(block: SparseMlp, density: float) -> Work:
    w, selector = block.weights, block.selector
    every = [leaf for leaf in (w.down_bias, w.down_scale) if leaf is not None]
    fixed = sum(leaf.nbytes for leaf in every)
    own = [x for x in jax.tree.leaves(selector) if jnp.issubdtype(x.dtype, jnp.floating)]
    matrices = [leaf for leaf in (w.up, w.gate, w.down) if leaf is not None]
    return Work(
        density * (_nbytes(w) - fixed) + fixed + _nbytes(own),
        density * size_of(matrices) + size_of(own),
    )


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
