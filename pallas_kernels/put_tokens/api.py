"""Tokens on their way into a cache: keys, values and what goes with them by one launch, in place.

XLA:GPU writes each array with a scatter of its own, and must be shown that what is overwritten has
been read before; `swap_tokens` reads it itself. Axis letters: A tokens, C slots.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import expect
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.put_tokens import reference, triton
from pallas_kernels.put_tokens.configs import Config, heuristic
from pallas_kernels.tuned import choose

Arrays = Mapping[str, jax.Array]


def put_tokens(
    stored: Arrays,
    tokens: Arrays,
    index: jax.Array,
    *,
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
      config: the tiling; None takes what `pallas_kernels.tuned.choose` gives.
      implementation: see `pallas_kernels.dispatch.dispatch`.

    Raises:
      ValueError: if a name, shape or dtype does not fit.
    """
    return _named(stored, _dispatched("put_tokens", stored, tokens, index, config, implementation))


def swap_tokens(
    stored: Arrays,
    tokens: Arrays,
    index: jax.Array,
    *,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`put_tokens`, and for every token what is not kept: what lay in its slot, or where nothing is
    written the token itself. The latter are of a dtype that holds both."""
    new, left = _dispatched("swap_tokens", stored, tokens, index, config, implementation)
    return _named(stored, new), _named(stored, left)


def _dispatched(
    name: str, stored: Arrays, tokens: Arrays, index: jax.Array, config, implementation
):
    _check(stored, tokens, index)
    width = max(x.shape[3] if x.ndim == 4 else 1 for x in stored.values())
    config = config or choose("put_tokens", heuristic, index.shape[-1], width)
    return dispatch(
        implementation,
        getattr(reference, name),
        functools.partial(getattr(triton, name), config=config),
        tuple(stored.values()), tuple(tokens[name] for name in stored), index.astype(jnp.int32),
    )  # fmt: skip


def _check(stored: Arrays, tokens: Arrays, index: jax.Array) -> None:
    if not stored or set(stored) != set(tokens):
        raise ValueError(f"tokens must have the arrays {sorted(stored)}, got {sorted(tokens)}")
    batch, heads, capacity = next(iter(stored.values())).shape[:3]
    if index.ndim not in (2, 3) or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"index must be integers [{batch}, _] or [{batch}, {heads}, _], got {index.dtype} "
            f"{list(index.shape)}"
        )
    expect("index", index, (batch, None) if index.ndim == 2 else (batch, heads, None))
    for name, x in stored.items():
        rest = x.shape[3:4]
        expect(f"stored[{name!r}]", x, (batch, heads, capacity, *rest))
        one = tokens[name]
        of_heads = 1 if one.ndim > 1 and one.shape[1] == 1 else heads
        expect(f"tokens[{name!r}]", one, (batch, of_heads, index.shape[-1], *rest))


def _named(stored: Arrays, found: Any) -> dict[str, jax.Array]:
    return dict(zip(stored, found, strict=True))
