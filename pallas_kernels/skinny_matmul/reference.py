"""The products of a few rows in plain `jnp`."""

import jax.numpy as jnp

from pallas_kernels.activation import REFERENCE


def skinny_matmul(x, weights, biases, *, jobs, activation, dtype):
    products = iter([_product(x, w, b) for w, b in zip(weights, biases, strict=True)])
    results = []
    for count in jobs:
        first, *more = (next(products) for _ in range(count))
        y = first if activation is None else REFERENCE[activation](first)
        results.append((y * more[0] if more else y).astype(dtype))
    return tuple(results)


def _product(x, weight, bias):
    y = jnp.einsum("ri,oi->ro", x, weight, preferred_element_type=jnp.float32)
    return y if bias is None else y + bias.astype(jnp.float32)
