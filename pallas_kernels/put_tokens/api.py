"""Tokens on their way into a cache: keys, values and what goes with them by one launch, in place.

XLA:GPU writes each array with a scatter of its own, and must be shown that what is overwritten has
been read before; `swap_tokens` reads it itself. Axis letters: A tokens, C slots.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, KeyLayout, check_layout, dispatch
from pallas_kernels.put_tokens import reference
from pallas_kernels.put_tokens.configs import Config, heuristic
from pallas_kernels.shapes import expect
from pallas_kernels.tuned import choose

Arrays = Mapping[str, jax.Array]


def put_tokens(
    stored: Arrays,
    tokens: Arrays,
    index: jax.Array,
    *,
    after: tuple[jax.Array, ...] = (),
    layout: KeyLayout = "BKSH",
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> dict[str, jax.Array]:
    """`stored` with token a of a row and head in slot `index[..., a]`.

    Args:
      stored: arrays [B, K, C] or [B, K, C, H] by name. Their buffers are taken over where the
        caller gives them up (donation).
      tokens: [B, K, A] or [B, K, A, H] by the same names, or the same for all heads, [B, 1, A]
        and so on. They are rounded to the dtype stored, to the largest number of float16 at most.
      index: i32[B, A], or i32[B, K, A]. An index outside of [0, C) writes nothing; no two of a row
        and head may be the same slot.
      after: arrays made from reads of the slots that must come before the write, see
        `pallas_kernels.ordering.write_index`; a launch comes after what made its inputs anyway.
      layout: with "BKHS" the array "k" is [B, K, H, C], which the reference alone writes; it also
        takes bfloat16 stored as the bits of uint16.
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.

    Raises:
      ValueError: if a name, shape or dtype does not fit.
    """
    found = _dispatched("put_tokens", stored, tokens, index, after, layout, config, implementation)
    return _named(stored, found)


def swap_tokens(
    stored: Arrays,
    tokens: Arrays,
    index: jax.Array,
    *,
    after: tuple[jax.Array, ...] = (),
    layout: KeyLayout = "BKSH",
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`put_tokens`, and for every token what is not kept: what lay in its slot, or where nothing is
    written the token itself. The latter are of a dtype that holds both."""
    new, left = _dispatched(
        "swap_tokens", stored, tokens, index, after, layout, config, implementation
    )
    return _named(stored, new), _named(stored, left)


def _dispatched(
    name: str, stored: Arrays, tokens: Arrays, index: jax.Array, after, layout: KeyLayout, config,
    implementation,
):  # fmt: skip
    check_layout(layout, implementation)
    axes = tuple(3 if layout == "BKHS" and array == "k" else 2 for array in stored)
    _check(stored, tokens, index, axes)
    width = max(x.shape[3] if x.ndim == 4 else 1 for x in stored.values())
    config = config or choose("put_tokens", heuristic, index.shape[-1], width)
    return dispatch(
        implementation,
        functools.partial(getattr(reference, name), axes=axes),
        functools.partial(_KERNELS[name], config=config),
        tuple(stored.values()), tuple(tokens[name] for name in stored), index.astype(jnp.int32),
        tuple(after),
    )  # fmt: skip


def _put_tokens(stored, tokens, index, after, **options):
    from pallas_kernels.put_tokens import triton  # a CPU never pays for Pallas

    return triton.put_tokens(stored, tokens, index, **options)


def _swap_tokens(stored, tokens, index, after, **options):
    from pallas_kernels.put_tokens import triton

    return triton.swap_tokens(stored, tokens, index, **options)


_KERNELS = {"put_tokens": _put_tokens, "swap_tokens": _swap_tokens}


def _check(stored: Arrays, tokens: Arrays, index: jax.Array, axes: tuple[int, ...]) -> None:
    if not stored or set(stored) != set(tokens):
        raise ValueError(f"tokens must have the arrays {sorted(stored)}, got {sorted(tokens)}")
    first = next(iter(stored.values()))
    (batch, heads), capacity = first.shape[:2], first.shape[axes[0]]
    if index.ndim not in (2, 3) or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"index must be integers [{batch}, _] or [{batch}, {heads}, _], got {index.dtype} "
            f"{list(index.shape)}"
        )
    expect("index", index, (batch, None) if index.ndim == 2 else (batch, heads, None))
    for (name, x), axis in zip(stored.items(), axes, strict=True):
        rest = (x.shape[2],) if axis == 3 else x.shape[3:4]
        slots = (*rest, capacity) if axis == 3 else (capacity, *rest)
        expect(f"stored[{name!r}]", x, (batch, heads, *slots))
        one = tokens[name]
        of_heads = 1 if one.ndim > 1 and one.shape[1] == 1 else heads
        expect(f"tokens[{name!r}]", one, (batch, of_heads, index.shape[-1], *rest))


def _named(stored: Arrays, found: Any) -> dict[str, jax.Array]:
    return dict(zip(stored, found, strict=True))
