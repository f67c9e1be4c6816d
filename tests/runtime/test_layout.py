"""Pinned layouts change no value; what they save is seen in test_decode_structure."""

import jax
import jax.numpy as jnp

from jaxinfer.runtime.layout import row_major


def test_pinning_changes_no_value():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(3)}
    same = jax.jit(row_major)(tree)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), tree, same))
