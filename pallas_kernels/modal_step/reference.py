"""The modal recurrence and the Hyena decode step in plain `jnp`."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def modal_step(state_re, state_im, u, pole_re, pole_im, residue_re, residue_im, h0):
    wide = u.astype(jnp.float32)
    y = h0 * wide + (residue_re * state_re - residue_im * state_im).sum(axis=-1)
    new_re = pole_re * state_re - pole_im * state_im + wide[..., None]
    new_im = pole_im * state_re + pole_re * state_im
    return y.astype(u.dtype), new_re, new_im


def short_filter(
    p: Float[Array, "B P"],
    past: Float[Array, "B P past"],
    taps: Float[Array, "P S"],
    bias: Float[Array, " P"],
) -> tuple[Float[Array, "B P"], Float[Array, "B P past"]]:
    """`bias + sum_j taps[:, S - 1 - j] p_(t - j)` of P channels, and the past of the next token."""
    window = jnp.concatenate([past, p[..., None].astype(past.dtype)], axis=-1)
    return (window.astype(jnp.float32) * taps).sum(axis=-1) + bias, window[..., 1:]


def hyena_step(p, past, taps, bias, state_re, state_im, *filters):
    filtered, past = short_filter(p, past, taps, bias)
    gate, x, v = jnp.split(filtered, 3, axis=-1)
    z, state_re, state_im = modal_step(state_re, state_im, x * v, *filters)
    return (gate * z).astype(p.dtype), past, state_re, state_im
