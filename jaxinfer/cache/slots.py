"""Dense slots: the arrays in which tiers keep tokens at full precision, and how they are read and
written.

On the CPU bfloat16 is stored as uint16 bits: XLA CPU would convert the whole cache to float32 and
back for each update (measured 58 against 13 ms). Writes are scatters that drop what is out of
range. Bytes per row and layer of C slots: `2 * K * H * C * itemsize`.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Geometry
from jaxinfer.ops.attention import KeyLayout
from jaxinfer.typing import Leaf
from pallas_kernels.dispatch import Implementation


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slots:
    """Keys and values of C slots, perhaps with the probability that each key has received."""

    k: Leaf  # [B, K, H, C] or [B, K, C, H]
    v: Leaf  # [B, K, C, H]
    mass: Leaf = None  # f32[B, K, C] or None
    pos: Leaf = None  # i32[B, K, C] where it is no function of slot and length
    layout: KeyLayout = field(default="BKHS", metadata={"static": True})
    block: int | None = field(default=128, metadata={"static": True})
    implementation: Implementation | None = field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.v.shape[2]


def new_slots(geometry: Geometry, batch: int, capacity: int, *, dtype: str | None = None) -> Slots:
    """Empty slots; `dtype` if it is not the geometry's."""
    b, k, h = batch, geometry.num_kv_heads, geometry.head_dim
    stored = storage_dtype(geometry, dtype)
    keys = (b, k, h, capacity) if geometry.key_layout == "BKHS" else (b, k, capacity, h)
    return Slots(
        k=jnp.zeros(keys, stored),
        v=jnp.zeros((b, k, capacity, h), stored),
        layout=geometry.key_layout,
        block=geometry.block,
        implementation=geometry.implementation,
    )


def slot_bytes(geometry: Geometry, capacity: int, *, dtype: str | None = None) -> int:
    """Bytes of keys and values in so many slots of one row."""
    item = storage_dtype(geometry, dtype).itemsize
    return 2 * geometry.num_kv_heads * geometry.head_dim * capacity * item


def put(
    slots: Slots, k: Float[Array, "B K A H"], v: Float[Array, "B K A H"], index: Array
) -> Slots:
    """Writes tokens to `index` i32[B, A] or, per head, [B, K, A]; `capacity` drops one."""
    k, v = store(k, slots.k.dtype), store(v, slots.v.dtype)
    if index.ndim == 2 and slots.layout == "BKSH":
        # XLA:GPU writes one element per index on its own, but a run of heads by a loop of updates.
        index = jnp.broadcast_to(index[:, None], (index.shape[0], k.shape[1], index.shape[1]))
    if index.ndim == 2:
        rows = jnp.arange(index.shape[0])[:, None]
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, A, K, H]
        where_v = (rows, slice(None), index)
        where_k = (rows, slice(None), slice(None), index) if slots.layout == "BKHS" else where_v
    else:
        rows = jnp.arange(index.shape[0])[:, None, None]
        heads = jnp.arange(index.shape[1])[None, :, None]
        where_v = (rows, heads, index)
        where_k = (rows, heads, slice(None), index) if slots.layout == "BKHS" else where_v
    return replace(
        slots,
        k=slots.k.at[where_k].set(k, mode="drop"),
        v=slots.v.at[where_v].set(v, mode="drop"),
    )


def get(slots: Slots, index: Int[Array, "B _ A"]) -> tuple[Array, Array]:
    """Keys and values [B, K, A, H] of the slots `index` [B, K|1, A], all in range."""
    heads = slots.v.shape[1]
    index = jnp.broadcast_to(index, (index.shape[0], heads, index.shape[2]))
    v = jnp.take_along_axis(slots.v, index[..., None], axis=2)
    if slots.layout == "BKHS":
        k = jnp.take_along_axis(slots.k, index[:, :, None], axis=3).swapaxes(2, 3)
    else:
        k = jnp.take_along_axis(slots.k, index[..., None], axis=2)
    return load(k), load(v)


def storage_dtype(geometry: Geometry, dtype: str | None = None) -> jnp.dtype:
    """What is stored for floats of `dtype` (default: the geometry's)."""
    dtype = geometry.dtype if dtype is None else dtype
    bits = dtype == "bfloat16" and geometry.key_layout == "BKHS"
    return jnp.dtype("uint16" if bits else dtype)


def load(x: Array) -> Array:
    """Stored numbers as floats."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def store(x: Array, dtype: jnp.dtype) -> Array:
    """Floats as stored numbers."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    if dtype == jnp.float16 and x.dtype != dtype:  # the largest number, not infinity
        x = jnp.clip(x, -65504.0, 65504.0)
    return x.astype(dtype)
