"""What a Hyena layer keeps of a text, and how accepted tokens enter it.

A layer that computes by modes keeps K complex numbers a channel, whatever the length: constant
memory and time a token. Any other keeps the inputs of its convolutions, from which the past is
convolved again in each step: exact, and memory grows.

Bytes of a row: `short` (S - 1) P itemsize; modes 8 F E K, with E = N^2 entries of a head's outer
product, that is 8 D N K; behind P taps `4 P I`; inputs `S I itemsize` for S tokens.

Axis letters: F filters, E entries under each, K modes, I inputs of the convolutions a token (F, or
2D of heads), A accepted tokens, S taps or stored tokens, P projections' width.
"""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Geometry, write_index
from jaxinfer.cache.context import CommitContext
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.slots import storage_dtype, store
from jaxinfer.config import ModelConfig
from jaxinfer.models.hyena_params import config_of
from jaxinfer.nn.hyena import modal_part, sizes
from jaxinfer.nn.modal import ModalFilter, powers
from jaxinfer.typing import Leaf, Params

CHUNK = 128  # tokens whose effect on the state is one product


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HyenaState:
    """One layer's; every leaf leads with the row."""

    short: Leaf  # [B, S - 1, P], projections of the last tokens, the oldest first
    re: Leaf = None  # f32[B, F, E, K]
    im: Leaf = None  # f32[B, F, E, K]
    delayed: Leaf = None  # f32[B, P, I], inputs that have not reached the modes behind P taps
    inputs: Leaf = None  # [B, S, I], of all tokens


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

    modes: int = 0  # 0: it keeps its inputs
    delay: int = 0
    filters: int = 0
    bounded: bool = False  # positions of the embedding end

    @classmethod
    def of(cls, cfg: ModelConfig, params: Params) -> "HyenaPolicy":
        modes, delay = sizes(params)
        return cls(
            name="hyena",
            modes=modes,
            delay=delay,
            filters=config_of(cfg).filters(cfg.hidden_size),
            bounded=cfg.positions == "learned",
        )

    @property
    def fixed_size(self) -> bool:
        return self.modes > 0

    @property
    def endless(self) -> bool:
        return self.fixed_size and not self.bounded


def empty_state(
    cfg: ModelConfig, policy: HyenaPolicy, geometry: Geometry, batch: int
) -> HyenaState:
    own = config_of(cfg)
    stored, width = storage_dtype(geometry), inputs_width(cfg)
    short = jnp.zeros((batch, own.short_taps - 1, (own.order + 1) * cfg.hidden_size), stored)
    if not policy.modes:
        return HyenaState(short=short, inputs=jnp.zeros((batch, geometry.capacity, width), stored))
    shape = (batch, policy.filters, own.head_size**2, policy.modes)
    re, im = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)  # two, to be donated
    delayed = jnp.zeros((batch, policy.delay, width), jnp.float32) if policy.delay else None
    return HyenaState(short=short, re=re, im=im, delayed=delayed)


def inputs_width(cfg: ModelConfig) -> int:
    """I."""
    own = config_of(cfg)
    return 2 * cfg.hidden_size if own.head_size > 1 else own.filters(cfg.hidden_size)


def entries(cfg: ModelConfig, inputs: Float[Array, "B A I"]) -> Float[Array, "B A F E"]:
    """What the filters convolve: the outer products of keys and values, or the inputs."""
    own = config_of(cfg)
    if own.head_size == 1:
        return inputs[..., None]
    split = (*inputs.shape[:2], 2, -1, own.head_size)
    k, v = (x[:, :, 0] for x in jnp.split(inputs.reshape(split), 2, axis=2))
    return (k[..., None] * v[..., None, :]).reshape(*k.shape[:-1], -1)


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
        return HyenaState(short=short, inputs=_stored(state.inputs, inputs, ctx))
    modal = modal_part(params)
    assert modal is not None
    arriving, delayed = inputs, None
    if state.delayed is not None:
        arriving = jnp.concatenate([state.delayed, inputs], axis=1)[:, : inputs.shape[1]]
        delayed = _last(state.delayed, inputs, ctx.count)
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
    new_re, new_im = _effect(cfg, modal, arrived, re, im)
    decay_re, decay_im = decay_re[:, :, None], decay_im[:, :, None]
    return decay_re * re - decay_im * im + new_re, decay_im * re + decay_re * im + new_im


def _power_of_rows(modal: ModalFilter, count: Int[Array, " B"]) -> tuple[Array, Array]:
    """lambda^count, f32[B, F, K] each."""
    found = powers(modal.nu, modal.theta, count)
    re, im = (jnp.moveaxis(x, -1, 0) for x in found)
    return re, im


def _effect(
    cfg: ModelConfig, modal: ModalFilter, inputs: Array, re: Array, im: Array
) -> tuple[Array, Array]:
    """`sum_j lambda^(A-1-j) u_j`, a chunk after the other."""
    size = inputs.shape[1]
    if size == 1:
        u = entries(cfg, inputs)[:, 0, ..., None]
        return jnp.broadcast_to(u, re.shape), jnp.zeros_like(im)
    chunk = min(size, CHUNK)
    count = -(-size // chunk)
    inputs = jnp.pad(inputs, [(0, 0), (count * chunk - size, 0), (0, 0)])
    tables = powers(modal.nu, modal.theta, jnp.arange(chunk)[::-1])
    whole_re, whole_im = (
        x[:, None, :, 0] for x in powers(modal.nu, modal.theta, jnp.array([chunk]))
    )

    def add(carry: tuple[Array, Array], part: Array) -> tuple[tuple[Array, Array], None]:
        u = entries(cfg, part)
        new = [jnp.einsum("fkj,bjfe->bfek", table, u, precision="highest") for table in tables]
        old_re, old_im = carry
        re = whole_re * old_re - whole_im * old_im + new[0]
        return (re, whole_im * old_re + whole_re * old_im + new[1]), None

    parts = jnp.stack(jnp.split(inputs, count, axis=1))
    found, _ = jax.lax.scan(add, (jnp.zeros_like(re), jnp.zeros_like(im)), parts)
    return found


def bytes_per_row(cfg: ModelConfig, policy: HyenaPolicy, geometry: Geometry) -> int:
    """As at the top of the file."""
    shapes = jax.eval_shape(lambda: empty_state(cfg, policy, geometry, 1))
    leaves = [getattr(shapes, one.name) for one in fields(shapes)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf is not None)
