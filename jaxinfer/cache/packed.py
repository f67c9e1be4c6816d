"""Keys or values of many tokens as packed codes, and the segment that attends to them.

`Packed` is one half (keys or values) of a layer's quantized tokens. Its leaves all run over the
same tokens along one axis, with one entry per word, per group or per token, so that `put`, `take`
and `span` treat them alike. Keys are packed along tokens, values along channels; each may be
grouped per channel (groups of consecutive tokens) or per token (groups of consecutive channels).
With 16 bits the words are the stored numbers themselves and there are no scales.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import QueryPhase
from jaxinfer.cache.slots import load, store
from jaxinfer.ops.attention import (
    AttentionSpec,
    Partial,
    empty_partial,
    key_weights,
    merge,
    partial_attention,
)
from jaxinfer.ops.quantize import dequantize, pack, put_runs, quantize, unpack
from jaxinfer.ops.stored import attend_packed
from jaxinfer.ops.stored_writes import write_packed
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf
from pallas_kernels.kivi_attention.api import PackedHalf, supported
from pallas_kernels.softmax_state import ExtraKeys, attended


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one half is stored; static. Axes are those of [B, K, H, S] or [B, K, S, H]."""

    bits: int
    group: int
    grouping: str  # "channel" or "token"
    token_axis: int
    word_axis: int
    scale_dtype: str  # what scales are rounded to
    scale_storage: str  # what they are stored as
    dense_storage: str  # of 16-bit "codes"

    @property
    def group_axis(self) -> int:
        return self.token_axis if self.grouping == "channel" else 5 - self.token_axis

    @property
    def packs_tokens(self) -> bool:
        """Whether a word holds one channel of several tokens, as those of keys do."""
        return self.word_axis == self.token_axis

    def has_kernel(self, width: int) -> bool:
        """Whether kernels read and write such a half of heads of size `width` ("BKSH")."""
        usual = "channel" if self.packs_tokens else "token"
        return self.grouping == usual and supported(self.bits, self.group, width)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Packed:
    """One half of some tokens. `words` u32 has S or H divided by 32 / bits along the word axis,
    `scale` and `zero` the same divided by the group along the group axis."""

    words: Leaf
    scale: Leaf
    zero: Leaf
    format: Format = field(metadata={"static": True})

    @property
    def tokens(self) -> int:
        f = self.format
        along_tokens = f.bits < 16 and f.packs_tokens
        return self.words.shape[f.token_axis] * (32 // f.bits if along_tokens else 1)

    @property
    def half(self) -> PackedHalf:
        """The leaves as the kernels take them."""
        return PackedHalf(self.words, self.scale, self.zero)

    def of(self, half: PackedHalf) -> "Packed":
        """The leaves `half` in this format."""
        return replace(self, words=half.words, scale=half.scale, zero=half.zero)

    def span(self, first: Int[Array, ""] | int, size: int) -> "Packed":
        """The `size` tokens from `first` on, both multiples of every word and group."""
        axis, tokens = self.format.token_axis, self.tokens

        def cut(x):
            unit = tokens // x.shape[axis]
            return jax.lax.dynamic_slice_in_dim(x, first // unit, size // unit, axis)

        return jax.tree.map(cut, self)

    def take(self, index: Int[Array, "B M"], size: int) -> "Packed":
        """The runs of `size` tokens with numbers `index`, one behind the other."""
        axis = self.format.token_axis
        count = index.shape[1]

        def gather(x):
            runs = self._runs(x, size)
            shape = [1] * runs.ndim
            shape[0], shape[axis] = index.shape
            taken = jnp.take_along_axis(runs, index.reshape(shape), axis=axis)
            return taken.reshape(
                *x.shape[:axis], count * runs.shape[axis + 1], *x.shape[axis + 1 :]
            )

        return jax.tree.map(gather, self)

    def put(self, index: Int[Array, "B M"], new: "Packed") -> "Packed":
        """With run m of `new` written at run `index[b, m]`; too large an index writes nothing.

        `new` consists of M runs of equal size.
        """
        if not self.tokens:
            return self
        axis = self.format.token_axis
        return jax.tree.map(lambda x, y: put_runs(x, y, index, axis), self, new)

    def pad(self, tokens: int) -> "Packed":
        """With room for `tokens`."""
        axis = self.format.token_axis
        empty = empty_packed(self.format, _shape_of(self, tokens))

        def widen(x, y):
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, max(y.shape[axis] - x.shape[axis], 0))
            return jnp.pad(x, widths)

        return jax.tree.map(widen, self, empty)

    def _runs(self, x: Array, size: int) -> Array:
        axis = self.format.token_axis
        entries = size * x.shape[axis] // self.tokens
        return x.reshape(*x.shape[:axis], x.shape[axis] // entries, entries, *x.shape[axis + 1 :])


def encode(form: Format, x: Float[Array, "B K _ _"]) -> Packed:
    """`x` as `form` stores it."""
    if form.bits == 16:
        words = store(x, jnp.dtype(form.dense_storage))
        return Packed(words=words, scale=None, zero=None, format=form)
    codes, *metadata = quantize(x, form.bits, form.group, form.group_axis, form.scale_dtype)
    scale, zero = (store(y, jnp.dtype(form.scale_storage)) for y in metadata)
    words = pack(codes, form.bits, form.word_axis)
    return Packed(words=words, scale=scale, zero=zero, format=form)


def decode(packed: Packed, dtype: str = "float32") -> Float[Array, "B K _ _"]:
    """What is stored, as floats in the layout of the format."""
    form = packed.format
    if form.bits == 16:
        return load(packed.words).astype(dtype)
    codes = unpack(packed.words, form.bits, form.word_axis)
    scale, zero = load(packed.scale), load(packed.zero)
    return dequantize(codes, scale, zero, form.group, form.group_axis, dtype)


def write(
    packed: Packed,
    new: Packed | Float[Array, "B K _ _"],
    index: Int[Array, "B M"],
    backend: Backend,
) -> tuple[Packed, tuple[Array, ...]]:
    """`packed` with `new` at the runs `index` (see `Packed.put`), and what proves to `write_index`
    that the numbers behind `new` have been read.

    Numbers are encoded on their way, on a GPU by the kernel where it knows the format; codes are
    written by XLA.
    """
    if not packed.tokens:
        return packed, ()
    form = packed.format
    if not isinstance(new, Packed):
        if backend.has_kernels:
            if form.has_kernel(new.shape[-1]):
                return _written_by_kernel(packed, new, index, backend)
            if backend.implementation is not None:
                raise ValueError(
                    "the kernels write 2-, 4- and 8-bit keys per channel and values per token in "
                    f"groups of 16 to 128, got {form} and heads of size {new.shape[-1]}; without "
                    "`implementation` they are written by XLA"
                )
        new = encode(form, new)
    return packed.put(index, new), evidence(new)


def _written_by_kernel(packed: Packed, x: Array, index: Array, backend: Backend):
    form = packed.format
    written = packed.of(
        write_packed(
            packed.half, x, index, bits=form.bits, per_channel=form.packs_tokens, backend=backend
        )
    )
    # One launch reads all of `x` and writes all of `written`: any element of it comes after.
    return written, evidence(jax.tree.map(lambda leaf: leaf[:1, :1, :1, :1], written))


def evidence(packed: Packed) -> tuple[Array, ...]:
    """What proves to `write_index` that the numbers behind `packed` have been read."""
    words = packed.words
    signed = (words >> 1).astype(jnp.int32) if words.dtype == jnp.uint32 else load(words)
    return (signed,) if packed.scale is None else (signed, load(packed.scale))


def empty_packed(form: Format, shape: tuple[int, ...]) -> Packed:
    """Zeros for tokens of the unpacked `shape`."""
    numbers = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(functools.partial(encode, form), numbers)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _shape_of(packed: Packed, tokens: int) -> tuple[int, ...]:
    """The unpacked shape with `tokens` tokens."""
    form = packed.format
    shape = list(packed.words.shape)
    if form.bits < 16:
        shape[form.word_axis] *= 32 // form.bits
    shape[form.token_axis] = tokens
    return tuple(shape)


@dataclass(frozen=True, kw_only=True)
class PackedSegment:
    """Quantized tokens; slots [0, stop) are the ones any row may use.

    With `block` the slots are unpacked that many at a time, never all of them at once. `first` is
    the position of slot 0 where positions count up with the slots, or None.
    """

    keys: Packed
    values: Packed
    pos: Array  # i32[B|1, 1, S]
    ok: Array  # bool[B, 1, S]
    stop: Array  # i32[]
    backend: Backend
    block: int | None
    first: int | None = 0
    query_phase: QueryPhase = "absolute"
    holds_tokens: bool = True

    @property
    def capacity(self) -> int:
        return self.pos.shape[2]

    def partial(self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn) -> Partial:
        size = self.capacity
        if self.backend.layout == "BKSH":
            return self._attend_at_once(spec, q, mask_fn)
        if self.block is None or size <= self.block:
            return self._attend(spec, q, mask_fn, 0, size, self.ok)
        block, start = self.block, 0
        if spec.window is not None and self.first is not None:
            oldest = jnp.min(q_pos) - spec.window + 1 - self.first
            start = jnp.maximum(oldest, 0) // block

        def body(i, partial):
            # The last block starts earlier where the slots are no multiple, and masks what it
            # shares with the one before.
            first = jnp.minimum(i * block, size - block)
            new = (jnp.arange(size) >= i * block) & self.ok
            return merge(partial, self._attend(spec, q, mask_fn, first, block, new))

        return jax.lax.fori_loop(start, self._blocks(), body, empty_partial(q))

    @property
    def ends_softmax(self) -> bool:
        return self.backend.layout == "BKSH"

    def output(self, spec: AttentionSpec, q: Array, mask_fn, extra: ExtraKeys) -> Array:
        return self._attend_at_once(spec, q, mask_fn, extra)

    def key_weights(
        self, spec: AttentionSpec, q: Array, q_pos: Array, mask_fn, lse: Array
    ) -> Array:
        size = self.capacity

        def weights_of(first, block):
            keys = decode(self.keys.span(first, block), self._dtype(q))
            distance, visible = mask_fn(_cut(self.pos, first, block), _cut(self.ok, first, block))
            return key_weights(spec, q, keys, distance, visible, lse, self.backend.layout)

        if self.block is None or size <= self.block:
            return weights_of(0, size)
        block = self.block

        def body(i, attn_weight):
            first = jnp.minimum(i * block, size - block)
            return jax.lax.dynamic_update_slice_in_dim(
                attn_weight, weights_of(first, block), first, axis=3
            )

        attn_weight = jnp.zeros((*q.shape[:2], q.shape[3], size), jnp.float32)
        return jax.lax.fori_loop(0, self._blocks(), body, attn_weight)

    def _attend(self, spec, q, mask_fn, first, size, ok) -> Partial:
        dtype = self._dtype(q)
        keys = decode(self.keys.span(first, size), dtype)
        values = decode(self.values.span(first, size), dtype)
        distance, visible = mask_fn(_cut(self.pos, first, size), _cut(ok, first, size))
        return partial_attention(spec, q, keys, values, distance, visible, self.backend.layout)

    def _attend_at_once(
        self, spec: AttentionSpec, q: Array, mask_fn, extra: ExtraKeys | None = None
    ) -> Any:
        """On a GPU: by the kernel, which unpacks in registers, where it knows the formats."""
        key_form, value_form = self.keys.format, self.values.format
        distance, visible = mask_fn(self.pos, self.ok)
        if all(form.has_kernel(q.shape[-1]) for form in (key_form, value_form)):
            return attend_packed(
                spec, q, self.keys.half, self.values.half, distance, visible, self.stop, extra,
                key_bits=key_form.bits, value_bits=value_form.bits, backend=self.backend,
            )  # fmt: skip
        if self.backend.implementation in ("triton", "interpret"):
            raise ValueError(
                "the kernels read 2-, 4- and 8-bit keys per channel and values per token in groups "
                f"of 16 to 128, got {key_form} and {value_form}; without `implementation` they are "
                "read by XLA"
            )
        packed = self.keys, self.values
        k, v = (decode(x.span(0, self.capacity), q.dtype.name) for x in packed)
        state = partial_attention(spec, q, k, v, distance, visible, self.backend.layout)
        return state if extra is None else attended(state, extra, q.dtype)

    def _dtype(self, q: Array) -> str:
        """Of unpacked numbers: XLA CPU has no bfloat16 arithmetic and would convert twice."""
        return "float32" if self.backend.layout == "BKHS" else q.dtype.name

    def _blocks(self) -> Array:
        assert self.block is not None
        return (self.stop + self.block - 1) // self.block


def _cut(x: Array, first, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=2)
