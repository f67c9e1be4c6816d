"""put_tokens and swap_tokens in plain `jnp`."""

import jax.numpy as jnp


def put_tokens(stored, tokens, index):
    places = _places(stored, index)
    return tuple(
        old.at[places].set(as_stored(_of_all_heads(new, old), old.dtype), mode="drop")
        for old, new in zip(stored, tokens, strict=True)
    )


def swap_tokens(stored, tokens, index):
    places = _places(stored, index)
    capacity = stored[0].shape[2]
    is_put = places[2] < capacity
    rows, heads, slots = places
    found = (rows, heads, jnp.minimum(slots, capacity - 1))
    left = tuple(
        jnp.where(is_put.reshape(is_put.shape + (1,) * (old.ndim - 3)), old[found], new)
        for old, new in zip(stored, tokens, strict=True)
    )
    return put_tokens(stored, tokens, index), left


def as_stored(x, dtype):
    """`x` rounded to `dtype`: what is too large for float16 becomes its largest number."""
    if dtype == jnp.float16 and x.dtype != dtype:
        limit = float(jnp.finfo(dtype).max)
        # bfloat16 would round the limit itself, up to what is infinity in float16.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = jnp.where(x > limit, limit, jnp.where(x < -limit, -limit, x))  # NaN stays
    return x.astype(dtype)


def _places(stored, index):
    """Row, head and slot of every token, [B, K, A] each; the capacity where nothing is written."""
    batch, heads, capacity = stored[0].shape[:3]
    slots = index if index.ndim == 3 else jnp.broadcast_to(
        index[:, None], (batch, heads, index.shape[1])
    )  # fmt: skip
    slots = jnp.where(slots < 0, capacity, slots)
    return jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None], slots


def _of_all_heads(x, old):
    return jnp.broadcast_to(x, (*old.shape[:2], *x.shape[2:]))
