"""Keys or values of many tokens as packed codes.

`Packed` is one half (keys or values) of a layer's quantized tokens. Its leaves all run over the
same tokens along one axis, with one entry per word, per group or per token, so that `put`, `take`
and `span` treat them alike. Keys are packed along tokens, values along channels; each may be
grouped per channel (groups of consecutive tokens) or per token (groups of consecutive channels).
With 16 bits the words are the stored numbers themselves and there are no scales.
"""

import functools
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.slots import load, store
from jaxinfer.ops.quantize import dequantize, pack, put_runs, quantize, unpack
from jaxinfer.ops.stored_writes import write_packed
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf
from pallas_kernels.kivi_attention.api import PackedHalf, supported


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
