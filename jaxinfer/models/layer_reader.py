"""Programs that run one layer at a time over many texts: memory is that of one layer, whatever the
depth.

The hidden states of all texts are kept on the host. Each layer reads those of a text as the model
itself does, alone or through the cache of a policy; `take` says, on the device, what to keep of its
activations, and the states become those behind the layer. Axis letters: Q texts, R rows (the valid
tokens of all texts in order: padding is in none).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.cache.context import StepContext, chain_context
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.cache.readback import Stored, stored_by_position
from jaxinfer.config import ModelConfig
from jaxinfer.models.activations import Activations, check_dense, layer_weights, read_layer
from jaxinfer.models.mixers import mixer_named
from jaxinfer.models.reach import check_positions
from jaxinfer.models.stack import NO_CACHE, cache_geometry, commit, embed
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params

CHUNK = 512  # tokens that a layer reads at once through a cache, where the policy allows it

Done: TypeAlias = Callable[[int], None]
"""Told how many texts are done."""

Take: TypeAlias = Callable[[int, Params, Activations], Mapping[str, Any]]
"""`take(layer, parameters of the layer, its activations)` gives arrays [T, ...] to keep; compiled
once for all layers of a kind, so the number may only tell kinds apart."""


class LayerReader:
    """Reads texts of `context` tokens, layer by layer; layers of a kind share one program.

    `policies` are those of the layers as their mixers keep their states under them
    (`jaxinfer.models.stack.layer_policies`), None: the layers read the texts as a whole, nothing is
    stored. A policy is read through `chunk` tokens at a time; its cache has `dtype` and `backend`
    (None: this machine's).

    Raises:
      ValueError: texts are longer than the model's learned positions or filters.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        context: int,
        take: Take,
        *,
        policies: Sequence[Policy] | None = None,
        chunk: int = CHUNK,
        dtype: str = "float32",
        backend: Backend | None = None,
    ):
        check_positions(cfg, context)
        self.cfg, self.context, self.take = cfg, context, take
        self.dtype, self.backend = dtype, backend
        self.policies = tuple(policies or (NO_CACHE,) * cfg.num_layers)
        self.stores = policies is not None
        self.chunk = min(chunk, context) if self.stores else context
        kinds = [
            (cfg.window(i), cfg.mlp(i), cfg.mixer(i), policy)
            for i, policy in enumerate(self.policies)
        ]
        self.programs = 0  # that its layers needed so far
        self._first = [kinds.index(kind) for kind in kinds]
        self._read = jax.jit(self._read_one, static_argnums=0)
        self._weigh = jax.jit(self._weigh_some, static_argnums=(0, 1))
        self._store = jax.jit(self._store_all, static_argnums=0)
        self._embed = jax.jit(self._embed_one)

    def embed(self, params: Params, tokens: Int[np.ndarray, "Q T"]) -> Float[np.ndarray, "Q T D"]:
        """The states in front of layer 0, in float32."""
        return np.stack([np.asarray(self._embed(params["embed"], row)) for row in tokens])

    def each(
        self,
        index: int,
        layer: Params,
        hidden: Float[np.ndarray, "Q T D"],
        lengths: Sequence[int] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """What `take` keeps of layer `index`, text by text; `hidden[q]` becomes the states behind
        the layer before text q's is given.

        Args:
          index: of the layer.
          layer: its parameters.
          hidden: the states in front of it.
          lengths: how many tokens of each text count, the first ones; None: all.

        Raises:
          ValueError: the layer's blocks are no dense ones, or numbers are not finite.
        """
        check_dense(layer, index)
        for row, length in enumerate(lengths or [self.context] * len(hidden)):
            cache = self._cache(index, length)
            taken, after = self._read(self._first[index], layer, cache, hidden[row], length)
            hidden[row] = np.asarray(after)
            if not np.isfinite(hidden[row, :length]).all():
                raise ValueError(
                    f"layer {index} gives numbers that are not finite; the model's weights are "
                    "damaged, or its dtype is too narrow: load it as float32"
                )
            yield taken

    def read(
        self,
        index: int,
        layer: Params,
        hidden: Float[np.ndarray, "Q T D"],
        lengths: Sequence[int],
        done: Done = lambda texts: None,
    ) -> dict[str, np.ndarray]:
        """What `take` keeps of layer `index`, [R, ...] each; the rest as in `each`."""
        kept: dict[str, np.ndarray] = {}
        first, total = 0, sum(lengths)
        for row, taken in enumerate(self.each(index, layer, hidden, lengths)):
            for name, x in taken.items():
                if name not in kept:
                    kept[name] = np.empty((total, *x.shape[1:]), x.dtype)
                kept[name][first : first + lengths[row]] = np.asarray(x)[: lengths[row]]
            first += lengths[row]
            done(row + 1)
        return kept

    def weights(
        self, index: int, layer: Params, before: Float[np.ndarray, "T D"], length: int, block: int
    ) -> Iterator[Float[np.ndarray, "_ N T"]]:
        """The attention of layer `index` through its cache, for the states `before` of one text:
        the probability that each token gives to each, some `block` queries of all heads at a time.

        Raises:
          ValueError: the layer has no attention, or nothing is stored.
        """
        self._check_attention(index, layer)
        chunk = self.chunk
        if self.policies[index].chunk_invariant:
            chunk = min(chunk, block)
        block = chunk * max(1, min(block, length) // chunk)
        cache = self._cache(index, length)
        for first in range(0, length, block):
            x = before[first : first + block]
            x = np.pad(x, ((0, block - len(x)), (0, 0)))
            cache, found = self._weigh(self._first[index], chunk, layer, cache, x, length)
            yield np.asarray(found)[: length - first]

    def stored(
        self, index: int, layer: Params, before: Float[np.ndarray, "T D"], length: int
    ) -> Stored:
        """What the cache of layer `index` gives back of a text with the states `before`, for one
        row.

        Raises:
          ValueError: the layer has no attention, or nothing is stored.
        """
        self._check_attention(index, layer)
        return self._store(self._first[index], layer, self._cache(index, length), before, length)

    def _check_attention(self, index: int, layer: Params) -> None:
        check_dense(layer, index)
        if "attn" not in layer or not self.stores:
            raise ValueError(
                f"layer {index} has a {self.cfg.mixer(index)} mixer, which gives no probabilities; "
                "look at the attention layers, through a policy"
            )

    def _cache(self, index: int, length: int) -> Cache:
        """An empty cache of the layer for one text."""
        policy, empty = self.policies[index], jnp.zeros((1,), jnp.int32)
        if not self.stores:
            return Cache(length=empty, layers=((),), policies=(policy,))
        capacity = 1 << max(self.context - 1, 0).bit_length()
        geometry = cache_geometry(self.cfg, capacity, self.dtype, self.backend)
        mixer = mixer_named(self.cfg.mixer(index))
        state = mixer.budgeted(policy, mixer.init(self.cfg, policy, geometry, 1), [length])
        return Cache(length=empty, layers=(state,), policies=(policy,), backend=geometry.backend)

    def _embed_one(self, table: Params, row: Array) -> Array:
        zero = jnp.zeros((1,), jnp.int32)
        ctx = chain_context(zero, zero + self.context, self.context, reads=False)
        return embed(self.cfg, {"embed": table}, row[None], ctx)[0].astype(jnp.float32)

    def _read_one(self, index: int, layer: Params, cache: Cache, x: Array, length: Array):
        self.programs += 1

        def look(cache: Cache, x: Array, ctx: StepContext, found: Activations) -> Activations:
            return found

        _, found = self._in_chunks(index, self.chunk, layer, cache, x, length, look)
        found = jax.tree.map(lambda x: x[: self.context], found)
        return dict(self.take(index, layer, found)), found.after.astype(jnp.float32)

    def _weigh_some(
        self, index: int, chunk: int, layer: Params, cache: Cache, x: Array, length: Array
    ):
        def look(cache: Cache, x: Array, ctx: StepContext, found: Activations) -> Array:
            return layer_weights(self.cfg, index, layer, cache, x, ctx, self.context)

        return self._in_chunks(index, chunk, layer, cache, x, length, look)

    def _store_all(self, index: int, layer: Params, cache: Cache, x: Array, length: Array):
        def look(cache: Cache, x: Array, ctx: StepContext, found: Activations) -> tuple:
            return ()

        cache, _ = self._in_chunks(index, self.chunk, layer, cache, x, length, look)
        (state,), (policy,) = cache.layers, cache.policies
        shape = self.cfg.num_kv_heads, self.cfg.head_dim
        aux = layer["attn"].get("cache")
        return stored_by_position(policy, state, aux, cache.length, shape, self.context)

    def _in_chunks(
        self, index: int, chunk: int, layer: Params, cache: Cache, x: Array, length: Array,
        look: Callable,
    ) -> tuple[Cache, Any]:  # fmt: skip
        """The cache behind the next tokens of a text, those with states `x` [T, D] as far as they
        are below `length`, and what `look` makes of each chunk, joined."""
        chunks = -(-len(x) // chunk)
        x = jnp.pad(x, ((0, chunks * chunk - len(x)), (0, 0)))
        x = x.reshape(chunks, 1, chunk, -1).astype(layer["attn_norm"]["scale"].dtype)

        def step(cache: Cache, x: Array) -> tuple[Cache, Any]:
            count = jnp.clip(length - cache.length, 0, chunk)
            ctx = chain_context(cache.length, count, chunk, reads=self.stores)
            found, fresh = read_layer(self.cfg, index, layer, cache, x, ctx)
            seen = look(cache, x, ctx, found)
            if self.stores:
                one = {"layers": (layer,)}
                cache = commit(self.cfg, one, cache, fresh, None, count, found.after)
            return cache, seen

        if chunks == 1:
            return step(cache, x[0])
        cache, found = jax.lax.scan(step, cache, x)
        return cache, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def valid_lengths(tokens: Int[np.ndarray, "Q T"], lengths: Sequence[int] | None) -> list[int]:
    """How many tokens of each text count, the first ones; None: all.

    Raises:
      ValueError: there is not one length for each text, or one is out of range.
    """
    count, size = tokens.shape
    if lengths is None:
        return [size] * count
    if len(lengths) != count or not all(0 < length <= size for length in lengths):
        raise ValueError(
            f"expected {count} lengths from 1 to {size}, one per text; got {len(lengths)}, "
            f"from {min(lengths, default=math.nan):g} to {max(lengths, default=math.nan):g}"
        )
    return list(lengths)
