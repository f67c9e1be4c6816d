"""Selections that know nothing of the context: what a learned one has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxinfer.sparsity.base import Rule, Selector


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Random(Selector):
    """Other random units for every token, drawn from its embedding's bits: as a selection must not
    depend on whom a token shares a step with, the place in a batch cannot be the seed."""

    number: int = field(metadata={"static": True})  # J
    rule: Rule = field(metadata={"static": True})
    seed: int = field(default=0, metadata={"static": True})

    @property
    def units(self) -> int:
        return self.number

    def __call__(self, sites: Sequence[Float[Array, "B T D"]]) -> Bool[Array, "R J"]:
        x = sites[0].astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(x.reshape(-1, x.shape[-1]), jnp.uint32)
        odd = (np.arange(x.shape[-1]) * (2 * 0x9E3779B1) + 1).astype(np.uint32)
        token = (bits * odd).sum(axis=-1, dtype=jnp.uint32)
        unit = _mixed(jnp.arange(self.number, dtype=jnp.uint32) + jnp.uint32(self.seed << 16))
        drawn = _mixed(token[:, None] + unit)
        return self.rule((drawn >> 8).astype(jnp.float32))  # float32 holds 24 bits

    def share(self) -> float:
        return self.rule.share(self.units)


def _mixed(x: Array) -> Array:
    """Every bit of the outcome depends on every bit of u32 x (the last steps of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
