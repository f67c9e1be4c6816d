"""Keys and values that are made when a group of heads needs them (DejaVu, arXiv 2310.17157, 4.2).

A layer that skips heads need not make their keys and values with each token. The newest tokens of a
row, those behind the last multiple of `TAIL`, stay as the layer's inputs in a tier in front of the
policy's. A step makes the keys and values of the groups that it uses for all of them, from inputs
and original positions; at every multiple all groups are made and go on to the policy's tiers, so
that no tier has holes. Bytes per row and layer: `TAIL * D * itemsize`.

The tiers behind are at most 15 tokens late. What they do at multiples of 16 tokens (KIVI with block
flushes), or not at all (full), they do as without; sliding values of KIVI are quantized later.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.cache.base import Geometry, Items, Tier, write_index
from jaxinfer.cache.context import PushContext, StepContext
from jaxinfer.cache.dense import DenseSegment
from jaxinfer.cache.policy import Policy
from jaxinfer.cache.slots import Slots, load, storage_dtype, store
from jaxinfer.cache.weights import gather
from jaxinfer.config import ModelConfig
from jaxinfer.models.projections import project
from jaxinfer.nn.listed import Listing, has_parts
from jaxinfer.nn.rope import rotate, rotation
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params

TAIL = 16  # tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The tail's state: the input of token t in slot t mod TAIL."""

    x: Leaf  # [B, TAIL, D]
    backend: Backend = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeysOf:
    """A layer's keys, rotated, and values as a function of its inputs."""

    params: Params
    cfg: ModelConfig = field(metadata={"static": True})
    exact: bool = field(metadata={"static": True})  # angles as positions in the cache need them
    backend: Backend | None = field(default=None, metadata={"static": True})

    @classmethod
    def of(
        cls, cfg: ModelConfig, policy: Policy, params: Params, backend: Backend | None
    ) -> "KeysOf":
        names = ("k", "v", "k_norm", "v_norm")
        return cls(
            params={name: params[name] for name in names if name in params},
            cfg=cfg, exact=policy.positions == "in_cache", backend=backend,
        )  # fmt: skip

    def __call__(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], listing: Listing | None = None
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        k, v = project(self.cfg, self.params, x, self.backend, names="kv", listing=listing)
        return self.rotated(k, positions), v

    def rotated(self, k: Float[Array, "B K S H"], positions: Int[Array, "B S"]) -> Array:
        rope = self.cfg.rope
        return k if rope is None else rotate(k, rotation(rope, positions, exact=self.exact))

    def where(
        self, needed: Bool[Array, ""], x: Float[Array, "B S D"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Of all groups; unless they are `needed`, anything, and no weights are read. On a GPU that
        takes a kernel (a branch would wait for the host in every layer): without one they are."""
        backend = self.backend
        if backend is None or backend.has_kernels:
            parts = backend is not None and has_parts(
                self.params["k"]["weight"], x.dtype, backend, 0
            )
            every = jnp.broadcast_to(needed, (1, self.cfg.num_kv_heads))
            return self(x, positions, Listing.of(every) if parts else None)

        def make() -> tuple[Array, Array]:
            return self(x, positions)

        def leave() -> tuple[Array, Array]:
            shapes = jax.eval_shape(make)
            return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

        return jax.lax.cond(needed, make, leave)


@dataclass(frozen=True, kw_only=True)
class Tail(Tier):
    """Keeps the inputs, `width` numbers each, of the tokens behind the last multiple of TAIL.

    It is told of more than other tiers: the items carry inputs (`Items.x`), and keys and values of
    them where all groups have been made; `aux["tail"]` are those of its own tokens that this step
    made, `aux["keys"]` a `KeysOf`.
    """

    width: int

    def init(self, geometry: Geometry, batch: int) -> Inputs:
        x = jnp.zeros((batch, TAIL, self.width), storage_dtype(geometry))
        return Inputs(x=x, backend=geometry.backend)

    def passed(self, n_in: Array) -> Array:
        return n_in // TAIL * TAIL

    def segments(self, state: Inputs, aux: Any, n_in: Array) -> tuple[DenseSegment, ...]:
        k, v = aux["tail"]
        backend = state.backend
        keys = k.swapaxes(2, 3) if backend.layout == "BKHS" else k
        slots = Slots(k=keys, v=v, backend=replace(backend, block=None))
        pos = tail_positions(n_in)[:, None]
        ok = pos < n_in[:, None, None]
        stop = jnp.max(n_in - self.passed(n_in))
        return (DenseSegment(slots=slots, pos=pos, ok=ok, stop=stop, in_order=False),)

    def push(self, state: Inputs, aux: Any, items: Items, ctx: PushContext):
        n_in, x = ctx.n_in, items.x[:, 0]
        flushed, stored = self.passed(n_in + ctx.count), load(state.x)
        spilled_count = flushed - self.passed(n_in)
        spilled, after = None, (ctx.after,)
        if ctx.spills:
            needed, keys = jnp.any(spilled_count > 0), aux["keys"]
            place, fresh_place = tail_positions(n_in), items.pos[:, 0]
            if items.k is None:
                both = jnp.concatenate([stored.astype(x.dtype), x], axis=1)
                k, v = keys.where(needed, both, jnp.concatenate([place, fresh_place], axis=1))
            else:
                old = keys.where(needed, stored.astype(x.dtype), place)
                k, v = (
                    jnp.concatenate(pair, axis=2)
                    for pair in zip(old, (items.k, items.v), strict=True)
                )
            spilled = _oldest(k, v, n_in)
            after = (ctx.after, spilled.k, spilled.v)
        token = n_in[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        stays = (token < (n_in + ctx.count)[:, None]) & (token >= flushed[:, None])
        index = write_index(jnp.where(stays, token % TAIL, TAIL), TAIL, *after)
        rows = jnp.arange(len(x))[:, None]
        new = state.x.at[rows, index].set(store(x, state.x.dtype), mode="drop")
        return Inputs(x=new, backend=state.backend), spilled, spilled_count

    def bytes_per_row(self, geometry: Geometry) -> int:
        return TAIL * self.width * storage_dtype(geometry).itemsize


def tail_positions(n_in: Int[Array, " B"]) -> Int[Array, "B S"]:
    """The positions that the tail's slots stand for."""
    return (n_in // TAIL * TAIL)[:, None] + jnp.arange(TAIL, dtype=jnp.int32)


def _oldest(k: Array, v: Array, n_in: Array) -> Items:
    """As many whole runs of TAIL tokens as there may be, oldest first: those of the tail's slots,
    which stand in front of `k` and `v`, and behind the stored ones the fresh ones."""
    size = (k.shape[2] - 1) // TAIL * TAIL
    order = jnp.arange(size, dtype=jnp.int32)
    behind = (n_in % TAIL)[:, None]
    index = jnp.where(order < behind, order, TAIL + order - behind)
    index = jnp.minimum(index, k.shape[2] - 1)
    pos = (n_in - n_in % TAIL)[:, None, None] + order
    return Items(k=gather(k, index), v=gather(v, index), pos=pos)


@dataclass(frozen=True, kw_only=True)
class Deferred(Policy):
    """The policy `behind` with a `Tail` in front of its tiers."""

    behind: Policy

    @classmethod
    def of(cls, cfg: ModelConfig, policy: Policy) -> "Deferred":
        given = {one.name: getattr(policy, one.name) for one in fields(Policy)}
        given["tiers"] = (Tail(width=cfg.hidden_size), *policy.tiers)
        return cls(**given, behind=policy)

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        if self.weigh_keys != "never" or self.commit_first:
            raise ValueError(
                f"policy {self.name!r} looks at every key when its token arrives, which heads with "
                "keys='deferred' have not made then; select heads with keys='always', or choose "
                "full, kivi or streaming"
            )
        self.behind.check(cfg, geometry)

    def admit(self, q_pos: Array, k_pos: Array) -> Array | bool:
        return self.behind.admit(q_pos, k_pos)

    def in_cache_positions(self, positions: Array) -> Array:
        return self.behind.in_cache_positions(positions)

    def horizon(self, length: Int[Array, " B"]) -> Array | None:
        passed = length // TAIL * TAIL
        most = self.behind.horizon(passed)
        # what is behind changes once so many tokens have gone on, which they do in whole tails
        return None if most is None else -(-(passed + most) // TAIL) * TAIL - length


def reading(
    keys: KeysOf, state: tuple[Leaf, ...], x: Float[Array, "B T D"], ctx: StepContext,
    listing: Listing | None,
) -> tuple[Array, Array, Params, StepContext]:  # fmt: skip
    """What a step attends to beside the tiers behind the tail: keys, not rotated, and values of the
    fresh tokens; those of the tail as `aux`; and the context whose pending tokens have theirs."""
    inputs, positions = [x], [ctx.positions]
    if ctx.pending is not None:
        inputs.insert(0, ctx.pending.x[:, 0])
        positions.insert(0, ctx.pending.pos[:, 0])
    if ctx.reads:
        inputs.insert(0, load(state[0].x).astype(x.dtype))
        positions.insert(0, tail_positions(ctx.length))
    sizes = [part.shape[1] for part in inputs]
    both = jnp.concatenate(inputs, axis=1) if len(inputs) > 1 else x
    k, v = project(keys.cfg, keys.params, both, keys.backend, names="kv", listing=listing)
    bounds = [sum(sizes[:i]) for i in range(1, len(sizes))]
    parts = list(zip(jnp.split(k, bounds, axis=2), jnp.split(v, bounds, axis=2), strict=True))
    made = [
        (keys.rotated(k, place), v)
        for (k, v), place in zip(parts[:-1], positions[:-1], strict=True)
    ]
    aux = {"tail": made.pop(0)} if ctx.reads else {}
    if ctx.pending is not None:
        k, v = made[0]
        ctx = replace(ctx, pending=Items(k=k, v=v, pos=ctx.pending.pos))
    return (*parts[-1], aux, ctx)


def uncommitted(x: Float[Array, "B T D"], fresh: Items, ctx: StepContext) -> Items:
    """The fresh tokens with the inputs from which their keys can be made; with keys and values only
    where all groups have been made, as a prompt does."""
    own = x[:, None]
    if ctx.pending is not None:
        own = jnp.concatenate([ctx.pending.x, own], axis=2)
    if ctx.is_prompt:
        return replace(fresh, x=own)
    return replace(fresh, x=own, k=None, v=None)
