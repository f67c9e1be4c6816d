"""KIVI: a cache of 2-bit (4-bit, 8-bit) codes with a full-precision tail (arXiv 2402.02750).

Keys are grouped per channel, values per token (section 3.2); the newest tokens stay as they are
(Algorithm 1). Everything is a closed form of the number n of tokens, with R the residual: keys
[0, n_k) are quantized in blocks of R, n_k = R * floor(n / R), and values [0, n_v), n_v = max(n - R,
0) ("sliding": each alone when it leaves the last R) or n_k ("block"). No token is quantized twice.

Two segments: packed tokens [0, n_v), and a dense ring of R slots with token t in slot t mod R. In
the sliding mode the ring's keys in [n_v, n_k) are what dequantization gives, so that both segments
have keys and values. Attention comes before the commit, as in the authors' code ("after"), so that
a step sees its own token in full precision.

Bytes per row and layer, for a capacity of C tokens, s bytes per scale and r per tail number, S_k =
R * floor(C / R) packed keys and S_v packed values:

    K * H * (S_k * (b_k / 8 + 2 s / G_k) + S_v * (b_v / 8 + 2 s / G_v) + 2 R r)

S_v is S_k for block flushes and max(C - R, 0), rounded up to whole words and groups of keys, for
sliding ones. With `window` W both are W for any C. A half of 16 bits takes r per number.
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.cache.base import Geometry, Items, Tier, write_index
from jaxinfer.cache.context import PushContext
from jaxinfer.cache.dense import DenseSegment
from jaxinfer.cache.kivi_checks import check_heads, check_settings
from jaxinfer.cache.kivi_tail import (
    along,
    completed_blocks,
    key_axis,
    oldest,
    put_completed,
    put_newest,
    stored_like,
)
from jaxinfer.cache.kivi_token import has_kernel, put_token
from jaxinfer.cache.packed import Format, Packed, decode, empty_packed, encode, write
from jaxinfer.cache.packed_segment import PackedSegment
from jaxinfer.cache.slots import Slots, new_slots, slot_bytes, storage_dtype
from jaxinfer.config import ModelConfig

READ_BLOCK = 512  # slots unpacked at a time; XLA CPU: 0.33 ms for 4096 tokens, dense 0.50


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KiviState:
    keys: Packed
    values: Packed
    tail: Slots  # token t in slot t mod R
    block: int | None = field(default=READ_BLOCK, metadata={"static": True})


@dataclass(frozen=True, kw_only=True)
class Kivi(Tier):
    """Quantizes the tokens that leave the newest `residual`.

    Grouping "channel" puts consecutive tokens of one channel into a group, "token" consecutive
    channels of one token. 16 bits keep a half as it is. `window` bounds the packed tokens: a
    complete block then replaces the one that is `window` tokens older, which is spilled,
    dequantized. `start` is how many tokens the tiers in front keep.
    """

    key_bits: int = 2
    value_bits: int = 2
    key_group: int = 32
    value_group: int = 32
    residual: int = 128
    value_flush: str = "sliding"
    key_grouping: str = "channel"
    value_grouping: str = "token"
    scale_dtype: str = "float16"
    residual_dtype: str | None = None
    window: int | None = None
    start: int = 0

    def __post_init__(self):
        check_settings(self)

    @property
    def grows(self) -> bool:
        return self.window is None

    def groups_tokens(self, half: str) -> bool:
        """Whether a group of that half ("key" or "value") spans several tokens."""
        packed = getattr(self, f"{half}_bits") < 16
        return packed and getattr(self, f"{half}_grouping") == "channel"

    def check(self, cfg: ModelConfig, geometry: Geometry) -> None:
        """Refuses head sizes that do not split into words and groups, and says what fits."""
        check_heads(self, geometry)

    def init(self, geometry: Geometry, batch: int) -> KiviState:
        check_heads(self, geometry)
        heads, size = geometry.num_kv_heads, geometry.head_dim
        keys, values = self.packed_slots(geometry.capacity)
        transposed = geometry.backend.layout == "BKHS"
        shape = (batch, heads, size, keys) if transposed else (batch, heads, keys, size)
        tail = new_slots(geometry, batch, self.residual, dtype=self.residual_dtype)
        return KiviState(
            keys=empty_packed(self._format("key", geometry), shape),
            values=empty_packed(self._format("value", geometry), (batch, heads, values, size)),
            tail=replace(tail, backend=replace(geometry.backend, block=None)),
            block=-(-READ_BLOCK // self._unit) * self._unit,
        )

    def passed(self, n_in: Array) -> Array:
        if self.window is None:
            return jnp.zeros_like(n_in)
        return jnp.maximum(n_in // self.residual * self.residual - self.window, 0)

    def packed_tokens(self, n_in: Array) -> Array:
        """n_v: the tokens in front of the tail, those that were passed on included."""
        if self.value_flush == "sliding":
            return jnp.maximum(n_in - self.residual, 0)
        return n_in // self.residual * self.residual

    def segments(
        self, state: KiviState, aux, n_in: Array
    ) -> tuple[PackedSegment | DenseSegment, ...]:
        tail = self._tail_segment(state, n_in)
        return (self._packed_segment(state, n_in), tail) if state.values.tokens else (tail,)

    def push(self, state: KiviState, aux, items: Items, ctx: PushContext):
        fresh = stored_like(state.tail, items)
        if self.window is None and has_kernel(state, fresh):
            new = put_token(state, fresh, ctx.n_in, ctx.count, ctx.after, flush=self.value_flush)
            return new, None, jnp.zeros_like(ctx.count)
        return self._push(state, fresh, ctx.n_in, ctx.count, ctx.after, ctx.spills)

    def _push(
        self, state: KiviState, fresh: Slots, n_in: Array, count: Array, after: Array, spills: bool
    ):
        """`push` of any number of tokens, as the tail holds them."""
        spilled, spilled_count = None, jnp.zeros_like(count)
        keys, values, tail = state.keys, state.values, state.tail
        reads: tuple[Array, ...] = (after,)  # what comes before the writes to the tail
        dequantizes = bool(keys.tokens) and self.value_flush == "sliding" and self.key_bits < 16
        if keys.tokens:
            blocks = completed_blocks(tail.k, fresh.k, n_in, key_axis(tail))
            leaving = self._leaving(tail, fresh, n_in)
            before_blocks: tuple[Array, ...] = (after,)
            # Codes that more than the packed halves need are made once, and written by XLA.
            completed = encode(keys.format, blocks) if dequantizes else None
            new_k, new_v = (blocks if completed is None else completed), leaving
            if self.window is not None and spills:
                new_k, new_v = encode(keys.format, blocks), encode(values.format, leaving)
                spilled, spilled_count = self._spill(state, new_k, new_v, n_in, count)
                before_blocks = (after, spilled.k, spilled.v)
            tokens = blocks.shape[key_axis(tail)]
            index = self._block_index(keys, tokens, n_in, count, before_blocks)
            keys, read_k = write(keys, new_k, index, tail.backend)
            if self.value_flush == "sliding":
                index = self._value_index(values, leaving.shape[2], n_in, count, after)
            values, read_v = write(values, new_v, index, tail.backend)
            reads = (after, *read_k, *read_v)
            if completed is not None:
                tail = put_completed(tail, completed, n_in, count, reads)
        tail = put_newest(tail, fresh, n_in, count, reads, keeps_completed=dequantizes)
        return replace(state, keys=keys, values=values, tail=tail), spilled, spilled_count

    def grow(self, state: KiviState, capacity: int) -> KiviState:
        keys, values = self.packed_slots(capacity)
        return replace(state, keys=state.keys.pad(keys), values=state.values.pad(values))

    def bytes_per_row(self, geometry: Geometry) -> int:
        numbers = geometry.num_kv_heads * geometry.head_dim
        item = storage_dtype(geometry, self.residual_dtype).itemsize
        total = slot_bytes(geometry, self.residual, dtype=self.residual_dtype)
        slots = self.packed_slots(geometry.capacity)
        for half, tokens in zip(("key", "value"), slots, strict=True):
            bits, group = getattr(self, f"{half}_bits"), getattr(self, f"{half}_group")
            if bits == 16:
                total += numbers * tokens * item
            else:
                scales = 2 * jnp.dtype(self.scale_dtype).itemsize
                total += numbers * tokens * bits // 8 + numbers * tokens // group * scales
        return total

    def packed_slots(self, capacity: int) -> tuple[int, int]:
        """S_k and S_v."""
        if self.window is not None:
            return self.window, self.window
        keys = capacity // self.residual * self.residual
        if self.value_flush == "block":
            return keys, keys
        return keys, -(-max(capacity - self.residual, 0) // self._unit) * self._unit

    @property
    def _unit(self) -> int:
        """Tokens in the shortest run of whole words and groups of both halves."""
        words = 32 // self.key_bits if self.key_bits < 16 else 1
        groups = (getattr(self, f"{h}_group") for h in ("key", "value") if self.groups_tokens(h))
        return math.lcm(words, *groups)

    def _format(self, half: str, geometry: Geometry) -> Format:
        token_axis = 3 if half == "key" and geometry.backend.layout == "BKHS" else 2
        return Format(
            bits=getattr(self, f"{half}_bits"),
            group=getattr(self, f"{half}_group"),
            grouping=getattr(self, f"{half}_grouping"),
            token_axis=token_axis,
            word_axis=token_axis if half == "key" else 3,
            scale_dtype=self.scale_dtype,
            scale_storage=str(storage_dtype(geometry, self.scale_dtype)),
            dense_storage=str(storage_dtype(geometry, self.residual_dtype)),
        )

    # What attention reads

    def _packed_segment(self, state: KiviState, n_in: Array) -> PackedSegment:
        size = state.values.tokens
        token = jnp.arange(size, dtype=jnp.int32)[None, None]
        stored = self.packed_tokens(n_in)[:, None, None]
        if self.window is not None:  # slot s holds the newest packed token that is s modulo W
            token = stored - 1 - jnp.mod(stored - 1 - token, self.window)
        return PackedSegment(
            keys=state.keys,
            values=state.values,
            pos=self.start + token,
            ok=(token >= 0) & (token < stored),
            stop=jnp.minimum(jnp.max(stored), size),
            backend=state.tail.backend,
            block=state.block,
            first=self.start if self.window is None else None,
        )

    def _tail_segment(self, state: KiviState, n_in: Array) -> DenseSegment:
        newest = n_in[:, None, None] - 1
        slots = jnp.arange(self.residual, dtype=jnp.int32)[None, None]
        token = newest - jnp.mod(newest - slots, self.residual)
        return DenseSegment(
            slots=state.tail,
            pos=self.start + token,
            ok=token >= self.packed_tokens(n_in)[:, None, None],
            stop=jnp.minimum(jnp.max(n_in), self.residual),
            in_order=False,
        )

    # What a push takes and where it goes: fresh tokens behind the n that are stored

    def _leaving(self, tail: Slots, fresh: Slots, n_in: Array) -> Array:
        """The values that a push may quantize: whole blocks, or as many tokens as are fresh."""
        if self.value_flush == "block":
            return completed_blocks(tail.v, fresh.v, n_in, 2)
        return oldest(tail.v, fresh.v, n_in)

    def _spill(self, state: KiviState, new_k: Packed, new_v: Packed, n_in: Array, count: Array):
        """The blocks that the ring loses, oldest first: stored ones, then of the new ones."""
        residual, width = self.residual, new_k.tokens // self.residual
        first = self.passed(n_in) // residual
        block = first[:, None] + jnp.arange(width, dtype=jnp.int32)
        stored = n_in[:, None] // residual
        slot = block % (state.keys.tokens // residual)
        order = jnp.clip(block - stored, 0, width - 1)
        is_old = jnp.repeat(block < stored, residual, axis=1)

        def dequantized(old: Packed, new: Packed) -> Array:
            axis = old.format.token_axis
            picked = (decode(old.take(slot, residual)), decode(new.take(order, residual)))
            x = jnp.where(along(is_old, axis), *picked)
            return x.swapaxes(2, 3) if axis == 3 else x

        token = first[:, None] * residual + jnp.arange(width * residual, dtype=jnp.int32)
        items = Items(
            k=dequantized(state.keys, new_k),
            v=dequantized(state.values, new_v),
            pos=(self.start + token)[:, None],
        )
        return items, self.passed(n_in + count) - self.passed(n_in)

    def _block_index(self, old: Packed, tokens: int, n_in: Array, count: Array, after) -> Array:
        """Where the blocks of so many new tokens go; nowhere if incomplete, or if a later one takes
        the same place."""
        size, full = old.tokens // self.residual, ((n_in + count) // self.residual)[:, None]
        width = tokens // self.residual
        block = (n_in // self.residual)[:, None] + jnp.arange(width, dtype=jnp.int32)
        if self.window is None:
            index = jnp.where(block < full, block, size)
        else:  # of more blocks than places only the last ones are written: no place twice
            is_last = (block < full) & (block >= full - size)
            index = jnp.where(is_last, block % size, size)
        return write_index(index, size, *after)

    def _value_index(self, old: Packed, tokens: int, n_in: Array, count: Array, after) -> Array:
        token = self.packed_tokens(n_in)[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        leaves = token < self.packed_tokens(n_in + count)[:, None]
        return write_index(jnp.where(leaves, token, old.tokens), old.tokens, after)
