"""What a cache keeps: the `Policy` that says it, one per layer, and the `Cache` that has it."""

import functools
import warnings
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.base import Geometry, QueryPhase, Tier
from jaxinfer.cache.feature_maps import LessFeatureMaps
from jaxinfer.config import ModelConfig
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which tiers a cache has and how tokens reach them; static, compared by value.

    `window` (with `sinks`) is the Lambda rule: a query sees the first `sinks` tokens and the
    `window` tokens before itself. With positions "in_cache" the distance to a sink never exceeds
    `sinks + window` (arXiv 2309.17453, section 3.2).

    How a prompt is read: in "chunks", each stored before the next one is read, or "whole", so that
    all of it attends to all of it (but for the window) in full precision and is stored then;
    `max_prefill_chunk` limits the tokens that are read at once in either case.

    What tiers learn of the attention: `weigh_keys` asks for the probability that keys receive in
    every step ("always") or when a prompt is read ("prompt", which costs decoding nothing).
    `query_window` counts only those of the last so many queries of a call.

    What is promised, and held by `jaxinfer.testing`: `chunk_invariant`, that chunks of any size
    give the same result; `lossless_under_tree`, that committing several tokens at once equals
    committing them one by one, up to `horizon`.

    `feature_maps` are learned parameters of tiers; they reach the tiers as `aux` and are
    no part of the policy's identity.
    """

    name: str
    tiers: tuple[Tier, ...] = ()
    positions: QueryPhase = "absolute"
    sinks: int = 0
    window: int | None = None
    prompt: Literal["chunks", "whole"] = "chunks"
    max_prefill_chunk: int | None = None
    weigh_keys: Literal["never", "always", "prompt"] = "never"
    query_window: int | None = None
    commit_first: bool = False  # a lone token attends to the state after its own push (reference)
    chunk_invariant: bool = True
    lossless_under_tree: bool = True
    feature_maps: LessFeatureMaps | None = field(default=None, compare=False, repr=False)

    @property
    def fixed_size(self) -> bool:
        """Whether the memory of a row does not depend on its tokens."""
        return bool(self.tiers) and not any(tier.grows for tier in self.tiers)

    @property
    def endless(self) -> bool:
        """Whether a text may go on for ever: neither memory nor positions grow with it."""
        return self.fixed_size and self.positions == "in_cache"

    @property
    def can_truncate(self) -> bool:
        """Whether a row is cut to its first tokens by setting its length."""
        return bool(self.tiers) and all(tier.truncates for tier in self.tiers)

    @property
    def reach(self) -> int | None:
        """Positions that a query and all it attends to span at most; None if that grows."""
        if not self.endless or self.window is None:
            return None
        return self.sinks + self.window + 1

    def warn_beyond(self, most: int, stacklevel: int = 2) -> None:
        """Warns if an endless policy spans more than the `most` positions of a model's training."""
        if self.reach is not None and self.reach > most:
            warnings.warn(
                f"policy {self.name!r} spans {self.reach} positions (sinks + window + 1), which "
                f"exceed the {most} positions that the model was trained on; take a smaller window",
                stacklevel=stacklevel + 1,
            )

    def layer_policies(self, layers: int) -> "tuple[Policy, ...]":
        """The policy of each layer."""
        return (self,) * layers

    def part(self, layers: range) -> "Policy":
        """The policy of a run of layers of a model."""
        maps = self.feature_maps
        return self if maps is None else replace(self, feature_maps=maps.part(layers))

    def sized(self, context: int) -> "Policy":
        """The policy with room for budgets that are shares of at most `context` tokens; each row
        takes them of its own (`Tier.budgeted`)."""
        return replace(self, tiers=tuple(tier.sized(context) for tier in self.tiers))

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        """Refuses, with the remedy, a model that the policy cannot serve."""
        if self.positions == "in_cache" and cfg.positions == "learned":
            raise ValueError(
                f"policy {self.name!r} counts positions inside the cache, but {cfg.family} adds "
                "learned positions to the embeddings; choose full, kivi or h2o"
            )
        if self.feature_maps is not None:
            self.feature_maps.check(cfg)
        for tier in self.tiers:
            tier.check(cfg, geometry)

    def check_room(self, capacity: int, prompt: int, new: int) -> None:
        """Refuses more new tokens behind a prompt than a tier of the policy can take.

        Raises:
            ValueError: if a tier's `room` is less than `new`.
        """
        for tier in self.tiers:
            room = tier.room(capacity, prompt)
            if room is not None and new > room:
                raise ValueError(
                    f"policy {self.name!r} has room for {max(room, 0)} tokens behind a prompt of "
                    f"{prompt}, but {new} are asked for; lower max_new_tokens or give it more room"
                )

    def weighs(self, is_prompt: bool) -> bool:
        """Whether such a call gives the tiers the probabilities that keys receive."""
        return self.weigh_keys == "always" or (self.weigh_keys == "prompt" and is_prompt)

    def admit(self, q_pos: Array, k_pos: Array) -> Array | bool:
        """Visibility by absolute position beyond causality."""
        if self.window is None:
            return True
        return (k_pos < self.sinks) | (q_pos - k_pos <= self.window)

    def horizon(self, length: Array) -> Array | None:
        """Tokens that may be committed at once before plain decoding would have seen a changed
        state; None without such a limit."""
        return None

    def in_cache_positions(self, positions: Array) -> Array:
        """Positions of queries of the "in_cache" phase, for keys in front of the window."""
        if self.window is None:
            return positions
        return jnp.minimum(positions, self.sinks + self.window)


@dataclass(frozen=True, kw_only=True)
class PerLayer(Policy):
    """Another policy for every layer; made by `jaxinfer.cache.presets.per_layer`."""

    layers: tuple[Policy, ...] = ()

    @property
    def fixed_size(self) -> bool:
        return all(policy.fixed_size for policy in self.layers)

    @property
    def endless(self) -> bool:
        return all(policy.endless for policy in self.layers)

    @property
    def reach(self) -> int | None:
        spans = [policy.reach for policy in self.layers]
        return None if None in spans else max(span for span in spans if span is not None)

    def layer_policies(self, layers: int) -> tuple[Policy, ...]:
        if len(self.layers) != layers:
            raise ValueError(
                f"got {len(self.layers)} policies for {layers} layers; give one or one each"
            )
        return self.layers

    def part(self, layers: range) -> "PerLayer":
        return replace(self, layers=self.layers[layers.start : layers.stop])

    def sized(self, context: int) -> "PerLayer":
        return replace(self, layers=tuple(policy.sized(context) for policy in self.layers))

    def check_room(self, capacity: int, prompt: int, new: int) -> None:
        for policy in dict.fromkeys(self.layers):
            policy.check_room(capacity, prompt, new)

    def horizon(self, length: Array) -> Array | None:
        limits = [policy.horizon(length) for policy in self.layers]
        finite = [limit for limit in limits if limit is not None]
        return functools.reduce(jnp.minimum, finite) if finite else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """All rows' committed tokens. `layers[i]` is layer i's mixer state. `pending` are the fresh
    tokens, per layer, of earlier calls that the next one sees too (see `StepContext`).
    `backend` is that of the layers and of what they compute beside attention; None, without stored
    tokens, leaves all to XLA, which can be differentiated."""

    length: Leaf  # i32[B]
    layers: tuple[Leaf, ...]
    pending: tuple[Leaf, ...] = ()
    policies: tuple[Policy, ...] = field(default=(), metadata={"static": True})
    backend: Backend | None = field(default=None, metadata={"static": True})
