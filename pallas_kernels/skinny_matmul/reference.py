"""The products of a few rows in plain `jnp`."""

import jax.numpy as jnp

from pallas_kernels.activation import REFERENCE


def skinny_matmul(x, weights, biases, live, *, jobs, activation, dtype, parts):
    weights = (_living(w, some, parts) for w, some in zip(weights, live, strict=True))
    products = iter([_product(x, w, b) for w, b in zip(weights, biases, strict=True)])
    results = []
    for count in jobs:
        first, *more = (next(products) for _ in range(count))
        y = first if activation is None else REFERENCE[activation](first)
        results.append((y * more[0] if more else y).astype(dtype))
    return tuple(results)


def _living(weight, live, parts):
    if live is None:
        return weight
    axis = int(parts == "inputs")
    every = jnp.repeat(live, weight.shape[axis] // live.shape[0])
    return jnp.where(every[None] if axis else every[:, None], weight, 0)


def _product(x, weight, bias):
    y = jnp.einsum("ri,oi->ro", x, weight, preferred_element_type=jnp.float32)
    return y if bias is None else y + bias.astype(jnp.float32)
