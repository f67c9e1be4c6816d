"""The activations of a frozen model, one layer at a time: what is learned from them is chosen by
who asks.

A walk keeps the hidden states of all sequences. Each layer is run on them as the model runs it,
whatever its family (positions, windows, grouped heads, parallel blocks); `take` says what to keep
of it, and the states become those behind the layer. Memory is that of one layer, whatever the
depth. Rows are the valid tokens of all sequences in order: padding is in none, and there are as
many as the texts have tokens.

Axis letters: Q sequences, R rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.cache.attend import attend, rotations
from jaxinfer.cache.context import StepContext, chain_context
from jaxinfer.cache.policy import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.models.attention import attention_spec, project
from jaxinfer.models.reach import check_positions
from jaxinfer.models.stack import NO_CACHE, blocks, embed
from jaxinfer.nn.linear import linear
from jaxinfer.nn.mlp import FeedForward, hidden_activations
from jaxinfer.nn.norm import norm
from jaxinfer.typing import Leaf, Params

Done: TypeAlias = Callable[[int], None]
"""Told how many sequences are done."""


class LayerView(NamedTuple):
    """What a layer makes of one sequence. Inputs of blocks are those behind their norms, as
    `jaxinfer.models.stack.blocks` collects them."""

    attention_input: Leaf  # [T, D]
    heads: Leaf  # [T, N, H], before the output projection; None where another mixer stands
    mlp_input: Leaf  # [T, D]
    hidden: Leaf  # [T, F], what the feed-forward block's `down` multiplies
    after: Leaf  # [T, D], the states behind the layer


Take: TypeAlias = Callable[[int, Params, LayerView], Mapping[str, Array]]
"""`take(layer, parameters of the layer, view)` gives what to keep, arrays [T, ...]; compiled once
for all layers of a kind, so the number may only tell kinds apart."""


class Walk:
    """Walks through a frozen model; layers of the same kind share one compiled program.

    Raises:
      ValueError: sequences are longer than the model's learned positions.
    """

    def __init__(self, cfg: ModelConfig, context: int, take: Take):
        check_positions(cfg, context)
        self.cfg, self.context, self.take = cfg, context, take
        kinds = [(cfg.window(i), cfg.mlp(i), cfg.mixer(i)) for i in range(cfg.num_layers)]
        self.programs = 0  # that its layers needed so far
        self._first = [kinds.index(kind) for kind in kinds]
        self._read = jax.jit(self._read_one, static_argnums=0)
        self._embed = jax.jit(self._embed_one)

    def embed(self, params: Params, tokens: Int[np.ndarray, "Q T"]) -> Float[np.ndarray, "Q T D"]:
        """The states in front of layer 0, in float32."""
        return np.stack([np.asarray(self._embed(params["embed"], row)) for row in tokens])

    def read(
        self,
        index: int,
        layer: Params,
        hidden: Float[np.ndarray, "Q T D"],
        lengths: Sequence[int],
        done: Done = lambda sequences: None,
    ) -> dict[str, np.ndarray]:
        """What `take` keeps of layer `index`, [R, ...] each; `hidden` becomes the states behind it.

        Raises:
          ValueError: the layer's feed-forward block is no dense one, or numbers are not finite.
        """
        if isinstance(layer["mlp"], FeedForward):
            raise ValueError(
                f"the feed-forward block of layer {index} is no dense one; give the model as it "
                "was before its blocks were replaced"
            )
        kept: dict[str, np.ndarray] = {}
        first, total = 0, sum(lengths)
        for row, length in enumerate(lengths):
            taken, after = self._read(self._first[index], layer, hidden[row], length)
            for name, x in taken.items():
                if name not in kept:
                    kept[name] = np.empty((total, *x.shape[1:]), x.dtype)
                kept[name][first : first + length] = np.asarray(x)[:length]
            hidden[row] = np.asarray(after)
            first += length
            if not np.isfinite(hidden[row, :length]).all():
                raise ValueError(
                    f"layer {index} gives numbers that are not finite; the model's weights are "
                    "damaged, or its dtype is too narrow: load it as float32"
                )
            done(row + 1)
        return kept

    def _context(self, length: int | Array) -> StepContext:
        return chain_context(
            jnp.zeros((1,), jnp.int32), jnp.full((1,), length, jnp.int32), self.context, reads=False
        )

    def _embed_one(self, table: Params, row: Array) -> Array:
        return embed(self.cfg, {"embed": table}, row[None], self._context(self.context))[0].astype(
            jnp.float32
        )

    def _read_one(self, index: int, layer: Params, x: Array, length: Array):
        self.programs += 1
        cfg, ctx = self.cfg, self._context(length)
        x = x[None].astype(layer["attn_norm"]["scale"].dtype)
        seen: list[Array] = []

        def watched(cfg: ModelConfig, block: Params, x: Array, layer: int) -> Array:
            hidden = hidden_activations(cfg, block, x, cfg.mlp(layer) == "gated")
            seen.extend((x[0], hidden[0]))
            return linear(block["down"], hidden)

        cache = Cache(length=ctx.length, layers=((),), policies=(NO_CACHE,))
        one = {"layers": (layer,)}
        layers = range(index, index + 1)
        after, _ = blocks(cfg, one, cache, x, ctx, layers=layers, mlp=watched)
        normed = norm(layer["attn_norm"], x, kind=cfg.norm, eps=cfg.norm_eps)
        heads = _heads(cfg, layer["attn"], normed, ctx, index) if "attn" in layer else None
        view = LayerView(normed[0], heads, seen[0], seen[1], after[0])
        return dict(self.take(index, layer, view)), after[0].astype(jnp.float32)


def _heads(
    cfg: ModelConfig, params: Params, x: Float[Array, "1 T D"], ctx: StepContext, layer: int
) -> Float[Array, "T N H"]:
    """What each head gives before the output projection; the layer computes it once more within."""
    q, k, v = project(cfg, params, x)
    angles = rotations(NO_CACHE, cfg.rope, ctx)
    spec = attention_spec(cfg, layer)
    y, _ = attend(NO_CACHE, spec, (), None, q, k, v, ctx, angles, params.get("sink"))
    return y[0].swapaxes(0, 1)


def valid_lengths(tokens: Int[np.ndarray, "Q T"], lengths: Sequence[int] | None) -> list[int]:
    """How many tokens of each sequence count, the first ones; None: all.

    Raises:
      ValueError: there is not one length for each sequence, or one is out of range.
    """
    count, size = tokens.shape
    if lengths is None:
        return [size] * count
    if len(lengths) != count or not all(0 < length <= size for length in lengths):
        raise ValueError(
            f"expected {count} lengths from 1 to {size}, one per sequence; got {len(lengths)}, "
            f"from {min(lengths, default=math.nan):g} to {max(lengths, default=math.nan):g}"
        )
    return list(lengths)
