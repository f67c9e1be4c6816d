"""Dense slots: the arrays in which tiers keep tokens at full precision, and how they are read and
written.

On the CPU bfloat16 is stored as uint16 bits: XLA CPU would convert the whole cache to float32 and
back for each update (measured 58 against 13 ms). Writes drop what is out of range: scatters, on a
GPU one kernel for all arrays. Bytes per row and layer of C slots: `2 * K * H * C * itemsize`.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxinfer.cache.base import Geometry, Items, write_index
from jaxinfer.ops.stored_writes import swap_tokens, write_tokens
from jaxinfer.runtime.backend import Backend, KeyLayout
from jaxinfer.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slots:
    """Keys and values of C slots, perhaps with the probability that each key has received."""

    k: Leaf  # [B, K, H, C] or [B, K, C, H]
    v: Leaf  # [B, K, C, H]
    attn_weight: Leaf = None  # f32[B, K, C] or None
    pos: Leaf = None  # i32[B, K, C] where it is no function of slot and length
    backend: Backend = field(default=Backend(), metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.v.shape[2]

    @property
    def layout(self) -> KeyLayout:
        return self.backend.layout


def new_slots(geometry: Geometry, batch: int, capacity: int, *, dtype: str | None = None) -> Slots:
    """Empty slots; `dtype` if it is not the geometry's."""
    b, k, h = batch, geometry.num_kv_heads, geometry.head_dim
    stored = storage_dtype(geometry, dtype)
    keys = (b, k, h, capacity) if geometry.backend.layout == "BKHS" else (b, k, capacity, h)
    return Slots(
        k=jnp.zeros(keys, stored),
        v=jnp.zeros((b, k, capacity, h), stored),
        backend=geometry.backend,
    )


def slot_bytes(geometry: Geometry, capacity: int, *, dtype: str | None = None) -> int:
    """Bytes of keys and values in so many slots of one row."""
    item = storage_dtype(geometry, dtype).itemsize
    return 2 * geometry.num_kv_heads * geometry.head_dim * capacity * item


def put(slots: Slots, items: Items, index: Array) -> Slots:
    """Writes tokens, with attention weights and positions where they are kept, to `index` i32[B, A]
    or, per head, [B, K, A]; `capacity` drops one.

    Of all reads of the slots `index` need not depend on those that the stored attention weights do.
    """
    return write_tokens(slots, items, index, reference=_scattered, backend=slots.backend)


def swap(slots: Slots, items: Items, index: Array) -> tuple[Slots, Items]:
    """`put`, and of each token what is not kept: what lay in its slot, or itself if dropped."""
    return swap_tokens(slots, items, index, reference=_swapped, backend=slots.backend)


def get(slots: Slots, index: Int[Array, "_ _ A"]) -> Items:
    """The tokens in the slots `index` [B|1, K|1, A], all in range; what is not stored is None."""
    batch, heads = slots.v.shape[:2]
    index = jnp.broadcast_to(index, (batch, heads, index.shape[2]))
    v = jnp.take_along_axis(slots.v, index[..., None], axis=2)
    if slots.layout == "BKHS":
        k = jnp.take_along_axis(slots.k, index[:, :, None], axis=3).swapaxes(2, 3)
    else:
        k = jnp.take_along_axis(slots.k, index[..., None], axis=2)
    pos, attn_weight = (
        None if x is None else jnp.take_along_axis(x, index, axis=2)
        for x in (slots.pos, slots.attn_weight)
    )
    return Items(k=load(k), v=load(v), pos=pos, attn_weight=attn_weight)


def stored_items(slots: Slots) -> Items:
    """All that is in the slots, also what no tier counts."""
    return get(slots, jnp.arange(slots.capacity, dtype=jnp.int32)[None, None])


def either(which: Bool[Array, "B _ A"], old: Items, new: Items) -> Items:
    """`old` where `which` [B, K|1, A], else `new`; what `old` lacks is that of `new`."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(which.reshape(*which.shape, *(1,) * (x.ndim - 3)), x, y)

    lacking = {
        name: getattr(new, name) for name in ("pos", "attn_weight") if getattr(old, name) is None
    }
    return jax.tree.map(choose, replace(old, **lacking), new)


def _scattered(slots: Slots, items: Items, index: Array) -> Slots:
    # The pass for the weights read the keys; XLA must see that before they are overwritten.
    index = write_index(index, slots.capacity, slots.attn_weight)
    rows = jnp.arange(index.shape[0])
    if index.ndim == 2 and slots.layout == "BKSH":
        # XLA:GPU writes one element per index on its own, but a run of heads by a loop of updates.
        index = jnp.broadcast_to(index[:, None], (*items.v.shape[:2], index.shape[1]))
    if index.ndim == 2:
        lead = (rows[:, None], slice(None))
    else:
        lead = (rows[:, None, None], jnp.arange(index.shape[1])[None, :, None])

    def write(name: str, *between: slice) -> Array:
        old, new = getattr(slots, name), store(getattr(items, name), getattr(slots, name).dtype)
        if index.ndim == 2:
            new = jnp.moveaxis(new, 2, 1)  # [B, A, K, ...]
        elif new.ndim == 3:
            new = jnp.broadcast_to(new, index.shape)
        return old.at[(*lead, *between, index)].set(new, mode="drop")

    more = {
        name: write(name) for name in ("attn_weight", "pos") if getattr(slots, name) is not None
    }
    between = (slice(None),) if slots.layout == "BKHS" else ()
    return replace(slots, k=write("k", *between), v=write("v"), **more)


def _swapped(slots: Slots, items: Items, index: Array) -> tuple[Slots, Items]:
    by_head = index if index.ndim == 3 else index[:, None]
    old = get(slots, jnp.minimum(by_head, slots.capacity - 1))
    # Read once: XLA:GPU would repeat the gather for each of its users, of which only those that
    # `write_index` knows of are sure to come before the write.
    left = jax.lax.optimization_barrier(either(by_head < slots.capacity, old, items))
    index = write_index(index, slots.capacity, left.k, left.v)
    return _scattered(slots, items, index), left


def storage_dtype(geometry: Geometry, dtype: str | None = None) -> jnp.dtype:
    """What is stored for floats of `dtype` (default: the geometry's)."""
    dtype = geometry.dtype if dtype is None else dtype
    bits = dtype == "bfloat16" and geometry.backend.layout == "BKHS"
    return jnp.dtype("uint16" if bits else dtype)


def load(x: Array) -> Array:
    """Stored numbers as floats."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def store(x: Array, dtype: jnp.dtype) -> Array:
    """Floats as stored numbers."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    if dtype == jnp.float16 and x.dtype != dtype:  # the largest number, not infinity
        wide = jnp.promote_types(x.dtype, jnp.float32)  # bfloat16 would round the limit up
        x = jnp.clip(x.astype(wide), -65504.0, 65504.0)
    return x.astype(dtype)
