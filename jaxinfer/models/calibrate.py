"""How large the inputs of a model's weights become: what rounding activations to 8 bits must know.

A few input channels of a transformer are far larger than the others, the same ones for every token,
and would leave the others few of 255 levels. SmoothQuant (arXiv 2211.10438, equation 4) divides
activations by a factor per channel and multiplies the weight by it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.models.mixers import mixer_of
from jaxinfer.models.params import is_weight
from jaxinfer.models.stack import forward
from jaxinfer.nn.linear import product, rows
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params, Tokenizer

STRENGTH = 0.4  # SmolLM2-135M, perplexity 24.40: none 25.43, 0.4 24.55, 0.5 24.69, 0.65 24.72
TOKENS = 256
TEXT = """The ferry left the harbour at six, an hour late, with forty passengers and a crate of live
hens on deck. "If the wind holds," said the captain, "we shall see the lighthouse before dark."
Nobody asked what would happen if it did not. In 1987 the crossing took 3.5 hours; today, with
larger engines, it takes about 2. The fare has risen from $4 to $17.50 in the same time.

def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b)) ** 0.5

To solve the equation, first move every term with x to the left side and divide by its coefficient.
Question: Which planet is closest to the sun? Answer: Mercury, whose year lasts 88 days.
"""


def calibration_tokens(cfg: ModelConfig, tokenizer: Tokenizer | None) -> Int[np.ndarray, " T"]:
    """The tokens of `TEXT`, or random ones where there is no tokenizer."""
    if tokenizer is None:
        tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, TOKENS)
    else:
        tokens = np.asarray(tokenizer.encode(TEXT))
    return tokens[: min(TOKENS, cfg.max_positions)].astype(np.int32)


class Smoothing(NamedTuple):
    """Factors f32[I] of weights, by path (`jax.tree_util.keystr`): of those in `divided` the norm
    in front is divided by them, those in `own` are left to the weight (`Int8Weight.smooth`)."""

    divided: Mapping[str, Array]
    own: Mapping[str, Array]


NO_SMOOTHING = Smoothing(MappingProxyType({}), MappingProxyType({}))


def smoothing(
    cfg: ModelConfig, params: Params, tokens: Int[np.ndarray, " T"]
) -> tuple[Params, Smoothing]:
    """The parameters with the factors of what their norms put out divided into these norms, and the
    factors of every weight.

    Weights that read one activation have the same factors, so that it is rounded once for all of
    them. A norm is divided only where all that reads it are weights that will know: it keeps its
    `divisor` for what selects by its output. The weights of a sparse block have the paths that
    those of a dense one would have.
    """
    return _smoothing(cfg, params, tokens[None])


@functools.partial(jax.jit, static_argnums=0)
def _smoothing(cfg: ModelConfig, params: Params, tokens: Array) -> tuple[Params, Smoothing]:
    seen: dict[str, Array] = {}

    def observed(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, StoredWeight):
            return leaf
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, FeedForward):
            parts = jax.tree.leaves(leaf.as_dense(), is_leaf=_is_whole)
            if not parts or any(map(_is_whole, parts)):
                return leaf
            return _ObservedBlock(block=leaf, name=name, seen=seen)
        if not is_weight(path):
            return leaf
        return _Observed(weight=leaf, name=name, seen=seen, dtype=str(leaf.dtype), origin="")

    forward(cfg, jax.tree_util.tree_map_with_path(observed, params, is_leaf=_is_whole), tokens)
    weights = _weights(params)
    own = {name: _factor(largest, [weights[name]]) for name, largest in seen.items()}
    divided, layers = {}, []
    for index, layer in enumerate(params["layers"]):
        new = dict(layer)
        for norm_name, readers in _readers(cfg, layer).items():
            group = [f"['layers'][{index}]{reader}" for reader in readers]
            group = [name for name in group if name in weights]
            if not group or not all(name in seen for name in group):
                continue
            shared = _factor(seen[group[0]], [weights[name] for name in group])
            divided |= dict.fromkeys(group, shared)
            new[norm_name] = {
                part: (value / shared).astype(value.dtype)
                for part, value in layer[norm_name].items()
            } | {"divisor": shared}
        layers.append(new)
    own = {name: factor for name, factor in own.items() if name not in divided}
    return params | {"layers": tuple(layers)}, Smoothing(divided, own)


def _factor(largest: Array, weights: list[Array]) -> Array:
    own = functools.reduce(
        jnp.maximum, [jnp.abs(weight.astype(jnp.float32)).max(axis=0) for weight in weights]
    )
    return jnp.maximum(largest, 1e-6) ** STRENGTH / jnp.maximum(own, 1e-6) ** (1 - STRENGTH)


def _readers(cfg: ModelConfig, layer: Params) -> dict[str, list[str]]:
    """The weights that read what each norm of a layer puts out, of norms where all are known."""
    name, mixer = mixer_of(layer)
    attn = [f"['{name}']['{part}']['weight']" for part in mixer.reads_norm]
    block = layer["mlp"]
    known = not isinstance(block, FeedForward) or block.as_dense() is not None
    mlp = [f"['mlp']['{name}']['weight']" for name in ("gate", "up")] if known else []
    if cfg.shared_norm:
        return {"attn_norm": attn + mlp} if attn and mlp else {}
    return {"attn_norm": attn, "mlp_norm": mlp}


def _weights(params: Params) -> dict[str, Any]:
    """Weights by path; those of a sparse block as of a dense one."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_whole):
        inside = leaf.as_dense() if isinstance(leaf, FeedForward) else leaf
        for rest, weight in jax.tree_util.tree_leaves_with_path(inside, is_leaf=_is_whole):
            if is_weight((*path, *rest)):
                found[jax.tree_util.keystr((*path, *rest))] = weight
    return found


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, StoredWeight | FeedForward)


def _largest(x: Array) -> Array:
    """Magnitude of each input, over all tokens."""
    return jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1]).max(axis=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Observed(StoredWeight):
    """A weight that writes down the largest magnitude of each input where it is multiplied."""

    weight: Any
    name: str = field(metadata={"static": True})
    seen: dict[str, Array] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def product(
        self, x: Float[Array, "... I"], backend: Backend | None = None
    ) -> Float[Array, "... O"]:
        self.seen[self.name] = _largest(x)
        return product(x, self.weight, jnp.float32, backend)

    def rows(self, indices: Int[Array, "..."]) -> Float[Array, "... I"]:
        return rows(self.weight, indices)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _ObservedBlock(FeedForward):
    """A sparse block that writes down what its weights would where they are multiplied."""

    block: FeedForward
    name: str = field(metadata={"static": True})
    seen: dict[str, Array] = field(metadata={"static": True})

    def __call__(
        self,
        cfg: ModelConfig,
        x: Float[Array, "B T D"],
        sites: Sequence[Array] = (),
        backend: Backend | None = None,
    ) -> Float[Array, "B T D"]:
        largest = {"down": _largest(self.block.hidden(cfg, x, sites))}
        for part in self.block.as_dense() or ():
            self.seen[f"{self.name}['{part}']['weight']"] = largest.get(part, _largest(x))
        return self.block(cfg, x, sites, backend)
