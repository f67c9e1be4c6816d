"""What attention kernels share: scores and their masks, and tiles of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import load, store
from pallas_kernels.shapes import power_of_two
from pallas_kernels.softmax_state import NEGATIVE


def partials(batch: int, heads: int, splits: int, rows: int, width: int):
    """What the programs of all splits write: accumulated values, maxima, sums."""
    shape = (batch, heads, splits, rows)
    return tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*shape, width), shape, shape))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What attention scores look like, and where their masks are: refs of [B|1, K|1, T|1, S].

    `groups` query heads share a key/value head; row g * size + t is query t of the g-th of them.
    """

    visible: Any
    alibi: Sequence[Any]  # refs of distances and slopes, or nothing
    groups: int
    size: int
    scale: float
    softcap: float | None

    def of(self, products, b, h, rows, exists, slots, inside):
        """Of raw products f32[rows, slots]: scores, NEGATIVE where hidden, and which are seen."""
        s = products * self.scale
        if self.softcap is not None:
            s = self.softcap * jnp.tanh(s / self.softcap)
        node = rows % self.size
        if self.alibi:
            distance, slopes = self.alibi
            head = h * self.groups + rows // self.size
            slope = load(slopes.at[head], mask=exists, other=0.0)
            bias = _entries(distance, b, h, node, slots, inside).astype(jnp.float32)
            s = s - slope[:, None] * bias
        seen = _entries(self.visible, b, h, node, slots, inside) != 0
        seen = seen & inside[None] & exists[:, None]
        return jnp.where(seen, s, NEGATIVE), seen


def ends(stop, batch: int, slots: int):
    """`stop`, or where there is none the number of slots for every row."""
    return jnp.full(batch, slots, jnp.int32) if stop is None else stop


def load_matrix(ref, place, rows, exists):
    """Rows of a matrix at `place` in `ref`, zero where they do not exist, padded to a power of
    two of at least 16 columns."""
    width = ref.shape[-1]
    columns = jnp.arange(power_of_two(width, least=16))
    mask = exists[:, None] & (columns < width)[None]
    return load(ref.at[(*place, rows[:, None], columns[None])], mask=mask, other=0.0)


def store_matrix(ref, place, rows, exists, matrix):
    """The inverse of `load_matrix`."""
    width = ref.shape[-1]
    columns = jnp.arange(matrix.shape[1])
    mask = exists[:, None] & (columns < width)[None]
    store(ref.at[(*place, rows[:, None], columns[None])], matrix, mask=mask)


def _entries(ref, b, h, node, slots, inside):
    """Of [B|1, K|1, T|1, S], the entries of queries `node` and of `slots`."""
    b = b if ref.shape[0] > 1 else 0
    h = h if ref.shape[1] > 1 else 0
    if ref.shape[2] == 1:
        return load(ref.at[b, h, 0, slots], mask=inside, other=0)[None]
    mask = jnp.broadcast_to(inside[None], (node.shape[0], slots.shape[0]))
    return load(ref.at[b, h, node[:, None], slots[None]], mask=mask, other=0)
