"""What a Hyena layer keeps of a text, and how accepted tokens enter it.

A layer that computes by modes keeps K complex numbers a channel, whatever the length: constant
memory and time a token; one that computes by P taps keeps its last P inputs. Any other keeps the
inputs of its convolutions, from which the past is convolved again in each step: exact, and memory
grows. `jaxinfer.models.hyena_ahead` sums these inputs in less time.

Bytes of a row: `short` (S - 1) P itemsize; modes 8 F E K, with E = N^2 entries of a head's outer
product, that is 8 D N K; behind P taps `4 P I`; inputs `S I itemsize` for S tokens, and what is
summed ahead of them `4 Q F E + 4`, with Q = S + 1 outputs of tiles, or those of an epoch.

Axis letters: F filters, E entries under each, K modes, I inputs of the convolutions a token (F, or
2D of heads), A accepted tokens, S taps or stored tokens, P projections' width.
"""

import math
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Geometry, write_index
from jaxinfer.cache.context import CommitContext
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.slots import storage_dtype, store
from jaxinfer.config import ModelConfig
from jaxinfer.hyena_config import ExactForm
from jaxinfer.models.hyena_params import config_of
from jaxinfer.models.hyena_prefill import state_of
from jaxinfer.nn.hyena import modal_part, sizes
from jaxinfer.nn.modal import ModalFilter, powers
from jaxinfer.typing import Leaf, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HyenaState:
    """One layer's; every leaf leads with the row."""

    short: Leaf  # [B, S - 1, P], projections of the last tokens, the oldest first
    re: Leaf = None  # f32[B, F, E, K]
    im: Leaf = None  # f32[B, F, E, K]
    delayed: Leaf = None  # f32[B, P, I], inputs that have not reached the modes behind P taps
    inputs: Leaf = None  # [B, S, I], of all tokens
    ahead: Leaf = None  # f32[B, Q, F, E], what they give to outputs to come
    start: Leaf = None  # i32[B], tokens that all of `ahead` has seen; -1: some of it is missing

    @property
    def past_is_delayed(self) -> bool:
        """Whether `delayed` is all that filters reach: they are taps alone."""
        return self.re is None and self.inputs is None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HyenaFresh:
    """Tokens of a call, those of earlier calls that are not committed first."""

    p: Leaf  # [B, A, P]
    inputs: Leaf  # f32[B, A, I]
    depth: Leaf  # i32[B, A], steps behind the committed text


@dataclass(frozen=True, kw_only=True)
class HyenaPolicy(Policy):
    """How a layer keeps its state. Policies of the cache concern attention; this stands in their
    place."""

    modes: int = 0
    delay: int = 0  # with no modes either it keeps its inputs
    filters: int = 0
    bounded: bool = False  # positions of the embedding end
    exact: ExactForm = "cached"  # how its inputs are summed

    @classmethod
    def of(cls, cfg: ModelConfig, params: Params) -> "HyenaPolicy":
        modes, delay = sizes(params)
        return cls(
            name="hyena",
            modes=modes,
            delay=delay,
            filters=config_of(cfg).filters(cfg.hidden_size),
            bounded=cfg.positions == "learned",
            exact=config_of(cfg).exact if modes + delay == 0 else "cached",
        )

    @property
    def fixed_size(self) -> bool:
        return self.modes + self.delay > 0

    @property
    def endless(self) -> bool:
        return self.fixed_size and not self.bounded


def empty_state(
    cfg: ModelConfig, policy: HyenaPolicy, geometry: Geometry, batch: int
) -> HyenaState:
    own = config_of(cfg)
    stored, width = storage_dtype(geometry), inputs_width(cfg)
    short = jnp.zeros((batch, own.short_taps - 1, (own.order + 1) * cfg.hidden_size), stored)
    if not policy.fixed_size:
        inputs = jnp.zeros((batch, geometry.capacity, width), stored)
        if policy.exact == "cached":
            return HyenaState(short=short, inputs=inputs)
        shape = (batch, outputs_ahead(policy, geometry.capacity), policy.filters, own.head_size**2)
        ahead, start = jnp.zeros(shape, jnp.float32), jnp.zeros(batch, jnp.int32)
        return HyenaState(short=short, inputs=inputs, ahead=ahead, start=start)
    delayed = jnp.zeros((batch, policy.delay, width), jnp.float32) if policy.delay else None
    if not policy.modes:
        return HyenaState(short=short, delayed=delayed)
    shape = (batch, policy.filters, own.head_size**2, policy.modes)
    re, im = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)  # two, to be donated
    return HyenaState(short=short, re=re, im=im, delayed=delayed)


def outputs_ahead(policy: HyenaPolicy, capacity: int) -> int:
    """Q: of tiles one more than there are tokens, so that a full cache that grows has the next; of
    an epoch a power of two near sqrt(S log S)."""
    if policy.exact == "tiled":
        return capacity + 1
    return 1 << round(0.5 * math.log2(capacity * max(math.log2(capacity), 1)))


def inputs_width(cfg: ModelConfig) -> int:
    """I."""
    own = config_of(cfg)
    return 2 * cfg.hidden_size if own.head_size > 1 else own.filters(cfg.hidden_size)


def committed(
    cfg: ModelConfig,
    params: Params,
    state: HyenaState,
    fresh: HyenaFresh,
    ctx: CommitContext,
) -> HyenaState:
    """The state behind the accepted tokens; a row that accepts none keeps its own bit by bit."""
    if ctx.accepted is None:
        p, inputs = fresh.p, fresh.inputs
    else:
        order = ctx.accepted[..., None]
        p, inputs = (jnp.take_along_axis(x, order, axis=1) for x in (fresh.p, fresh.inputs))
    short = _last(state.short, store(p, state.short.dtype), ctx.count)
    if state.inputs is not None:
        return replace(state, short=short, inputs=_stored(state.inputs, inputs, ctx))
    modal = modal_part(params)
    assert modal is not None
    arriving, delayed = inputs, None
    if state.delayed is not None:
        arriving = jnp.concatenate([state.delayed, inputs], axis=1)[:, : inputs.shape[1]]
        delayed = _last(state.delayed, inputs, ctx.count)
    if state.re is None:
        return HyenaState(short=short, delayed=delayed)
    re, im = _absorbed(cfg, modal, state.re, state.im, arriving, ctx.count)
    return HyenaState(short=short, re=re, im=im, delayed=delayed)


def _last(past: Array, new: Array, count: Int[Array, " B"]) -> Array:
    """The last tokens of `past` and the first `count` new ones, as many as `past` has."""
    both = jnp.concatenate([past, new], axis=1)
    index = count[:, None] + jnp.arange(past.shape[1])
    return jnp.take_along_axis(both, index[..., None], axis=1)


def _stored(stored: Array, inputs: Array, ctx: CommitContext) -> Array:
    order, capacity = jnp.arange(inputs.shape[1], dtype=jnp.int32), stored.shape[1]
    index = jnp.where(order < ctx.count[:, None], ctx.length[:, None] + order, capacity)
    index = write_index(index, capacity, ctx.after)
    rows = jnp.arange(len(stored))[:, None]
    return stored.at[rows, index].set(store(inputs, stored.dtype), mode="drop")


def _absorbed(
    cfg: ModelConfig,
    modal: ModalFilter,
    re: Float[Array, "B F E K"],
    im: Float[Array, "B F E K"],
    inputs: Float[Array, "B A I"],
    count: Int[Array, " B"],
) -> tuple[Array, Array]:
    """`x <- lambda^n x + sum_j lambda^(n-1-j) u_j` with the row's first n = `count` inputs.

    They are moved to the end, behind zeros, so that all rows share one table of powers: rows of
    different lengths need no lambda to a negative power, which has no bound.
    """
    size = inputs.shape[1]
    decay_re, decay_im = _power_of_rows(modal, count)
    if size == 1:
        arrived = jnp.where(count[:, None, None] > 0, inputs, 0)
    else:
        index = jnp.arange(size) - (size - count[:, None])
        arrived = jnp.take_along_axis(inputs, jnp.maximum(index, 0)[..., None], axis=1)
        arrived = jnp.where(index[..., None] >= 0, arrived, 0)
    new_re, new_im = state_of(cfg, modal, arrived)
    decay_re, decay_im = decay_re[:, :, None], decay_im[:, :, None]
    return decay_re * re - decay_im * im + new_re, decay_im * re + decay_re * im + new_im


def _power_of_rows(modal: ModalFilter, count: Int[Array, " B"]) -> tuple[Array, Array]:
    """lambda^count, f32[B, F, K] each."""
    found = powers(modal.nu, modal.theta, count)
    re, im = (jnp.moveaxis(x, -1, 0) for x in found)
    return re, im


def bytes_per_row(cfg: ModelConfig, policy: HyenaPolicy, geometry: Geometry) -> int:
    """As at the top of the file."""
    shapes = jax.eval_shape(lambda: empty_state(cfg, policy, geometry, 1))
    leaves = [getattr(shapes, one.name) for one in fields(shapes)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf is not None)
