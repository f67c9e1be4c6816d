"""Which arrays of a cache are large enough that a step must not copy them."""

from typing import Any

import jax

from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.policy import Cache
from jaxinfer.models.hyena_state import HyenaState


def felt_leaves(cache: Cache, grown: Cache, capacity: int) -> list[jax.ShapeDtypeStruct]:
    """The leaves with keys, values or their codes, or what a recurrence keeps, whose copy would be
    felt.

    Those have four axes (a Hyena layer's three or four) and at least 1/16 of the bytes of the
    largest one; less are the few bytes per slot of a policy's books, and sinks. Beside leaves that
    grow with the capacity (`grown` is the cache of twice the capacity) those of constant size are
    left out: KIVI's step passes over its tail of R tokens. So are leaves of no more tokens than are
    read as one block.
    """
    largest = max((bytes_of(leaf) for leaf in jax.tree.leaves(cache.layers)), default=0)
    blocks = cache.backend is not None and cache.backend.block is not None
    found: list[jax.ShapeDtypeStruct] = []
    for small, large in zip(_tiers(cache), _tiers(grown), strict=True):
        pairs = zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True)
        axes = 3 if isinstance(small, HyenaState) else 4
        wide = [(leaf, leaf.shape != other.shape) for leaf, other in pairs if leaf.ndim >= axes]
        if not any(grows for _, grows in wide):
            found += [leaf for leaf, _ in wide]
        elif not (blocks and capacity <= _block(small)):
            found += [leaf for leaf, grows in wide if grows]
    return [leaf for leaf in found if 16 * bytes_of(leaf) >= largest]


def _tiers(cache: Cache) -> list[Any]:
    """The states of all layers' tiers."""
    layers = (layer if isinstance(layer, tuple) else (layer,) for layer in cache.layers)
    return [tier for layer in layers for tier in layer]


def _block(tier: Any) -> int:
    """Tokens that a CPU reads at once."""
    backend = getattr(tier, "backend", None)
    return getattr(tier, "block", None) or getattr(backend, "block", None) or 0
