"""A decode loop of one attention layer in the three orders of reading and writing its cache."""

import jax
import jax.numpy as jnp


def cache_leaves(batch=2, kv_heads=2, width=16, slots=1024, dtype=jnp.float32, transposed=True):
    """Abstract keys ([B, K, H, S] when transposed) and values [B, K, S, H]."""
    keys = (batch, kv_heads, width, slots) if transposed else (batch, kv_heads, slots, width)
    values = (batch, kv_heads, slots, width)
    return jax.ShapeDtypeStruct(keys, dtype), jax.ShapeDtypeStruct(values, dtype)


def other_arguments(batch=2, kv_heads=2, width=16, dtype=jnp.float32):
    query = jax.ShapeDtypeStruct((batch, kv_heads, width), dtype)
    return query, jax.ShapeDtypeStruct((), jnp.int32)


def attend(query, keys, values, live, transposed=True):
    layout = "bkhs" if transposed else "bksh"
    scores = jnp.einsum(f"bkh,{layout}->bks", query, keys, preferred_element_type=jnp.float32)
    visible = jnp.arange(values.shape[2])[None, None] < live[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    return jnp.einsum("bks,bksh->bkh", weights.astype(values.dtype), values).astype(query.dtype)


def loop(order, transposed=True):
    """`order`: "guarded" (read, write behind the drawn token), "unguarded" or "write first"."""

    def write(keys, values, query, index):
        rows = jnp.arange(values.shape[0])
        fresh_keys, fresh_values = jnp.sin(query), jnp.cos(query)
        where = (
            (rows, slice(None), slice(None), index) if transposed else (rows, slice(None), index)
        )
        keys = keys.at[where].set(fresh_keys, mode="drop")
        return keys, values.at[rows, :, index].set(fresh_values, mode="drop")

    def step(state):
        turn, live, query, keys, values = state
        capacity = values.shape[2]
        if order == "write first":
            keys, values = write(keys, values, query, live)
        out = attend(query, keys, values, live, transposed)
        if order != "write first":
            token = jnp.argmax(out.reshape(out.shape[0], -1), axis=-1)
            index = live
            if order == "guarded":
                index = jnp.minimum(live, capacity + jnp.any(token < 0).astype(jnp.int32))
            keys, values = write(keys, values, query, index)
        return turn + 1, live + 1, out, keys, values

    def run(cache, query, steps):
        live = jnp.arange(query.shape[0], dtype=jnp.int32) + 5
        state = (jnp.int32(0), live, query, *cache)
        return jax.lax.while_loop(lambda s: s[0] < steps, step, state)

    return run


def compiled(function, *args, donate=(0,)):
    return jax.jit(function, donate_argnums=donate).lower(*args).compile()
