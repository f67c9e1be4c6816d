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

from jaxinfer.cache.base import Geometry, Items
from jaxinfer.ops.stored_writes import swap_tokens, write_tokens
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf
from pallas_kernels.dispatch import KeyLayout
from pallas_kernels.put_tokens.reference import as_floats, as_stored, take


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slots:
    """Keys and values of C slots, perhaps with the probability that each key has received.

    Where a budget is a share of a row's own prompt, C is that of the longest prompt that the cache
    was made for, and every row uses its first `budget` slots.
    """

    k: Leaf  # [B, K, H, C] or [B, K, C, H]
    v: Leaf  # [B, K, C, H]
    attn_weight: Leaf = None  # f32[B, K, C] or None
    pos: Leaf = None  # i32[B, K, C] where it is no function of slot and length
    budget: Leaf = None  # i32[B], slots that each row may use; None: all of them
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


def usable(slots: Slots, axes: int = 0) -> Array | int:
    """How many slots each row may use, with so many axes of one behind that of the rows."""
    if slots.budget is None:
        return slots.capacity
    return slots.budget.reshape(-1, *(1,) * axes)


def slot_bytes(geometry: Geometry, capacity: int, *, dtype: str | None = None) -> int:
    """Bytes of keys and values in so many slots of one row."""
    item = storage_dtype(geometry, dtype).itemsize
    return 2 * geometry.num_kv_heads * geometry.head_dim * capacity * item


def put(slots: Slots, items: Items, index: Array) -> Slots:
    """Writes tokens, with attention weights and positions where they are kept, to `index` i32[B, A]
    or, per head, [B, K, A]; `capacity` drops one.

    Of all reads of the slots `index` need not depend on those that the stored attention weights do.
    """
    # The pass for the weights read the keys; XLA must see that before they are overwritten.
    after = () if slots.attn_weight is None else (slots.attn_weight,)
    new = write_tokens(*_arrays(slots, items), index, after, backend=slots.backend)
    return replace(slots, **new)


def swap(slots: Slots, items: Items, index: Array) -> tuple[Slots, Items]:
    """`put`, and of each token what is not kept: what lay in its slot, or itself if dropped."""
    after = () if slots.attn_weight is None else (slots.attn_weight,)
    new, left = swap_tokens(*_arrays(slots, items), index, after, backend=slots.backend)
    return replace(slots, **new), replace(items, **left)


def get(slots: Slots, index: Int[Array, "_ _ A"]) -> Items:
    """The tokens in the slots `index` [B|1, K|1, A], all in range; what is not stored is None."""
    pos, attn_weight = (
        None if x is None else take(x, index, 2) for x in (slots.pos, slots.attn_weight)
    )
    return Items(
        k=load(take(slots.k, index, 3 if slots.layout == "BKHS" else 2)),
        v=load(take(slots.v, index, 2)),
        pos=pos,
        attn_weight=attn_weight,
    )


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


def _arrays(slots: Slots, items: Items) -> tuple[dict[str, Array], dict[str, Array]]:
    """What the slots keep, and the same of the items."""
    names = [x for x in ("k", "v", "attn_weight", "pos") if getattr(slots, x) is not None]
    stored, tokens = ({name: getattr(of, name) for name in names} for of in (slots, items))
    return stored, tokens


def storage_dtype(geometry: Geometry, dtype: str | None = None) -> jnp.dtype:
    """What is stored for floats of `dtype` (default: the geometry's)."""
    dtype = geometry.dtype if dtype is None else dtype
    bits = dtype == "bfloat16" and geometry.backend.layout == "BKHS"
    return jnp.dtype("uint16" if bits else dtype)


def load(x: Array) -> Array:
    """Stored numbers as floats."""
    return as_floats(x)


def store(x: Array, dtype: jnp.dtype) -> Array:
    """Floats as stored numbers."""
    return as_stored(x, dtype)
