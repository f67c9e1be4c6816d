"""Cache policies on the read, merge, commit protocol of `jaxinfer.cache.base`.

What a policy of your own needs: `Policy`, `Tier` and its contexts, the tiers and segments of the
library to build on, and the slots in which tokens are kept at full precision.
"""

from jaxinfer.cache.base import Geometry, Items, Segment, Tier, bytes_of, write_index
from jaxinfer.cache.context import CommitContext, PushContext, StepContext, chain_context
from jaxinfer.cache.dense import Dense, DenseSegment
from jaxinfer.cache.heavy import Heavy
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.cache.policy import Cache, PerLayer, Policy
from jaxinfer.cache.presets import (
    full,
    h2o,
    less,
    per_layer,
    register_policy,
    resolve,
    streaming,
)
from jaxinfer.cache.ring import Ring, Sinks, items_at
from jaxinfer.cache.slots import (
    Slots,
    get,
    load,
    new_slots,
    put,
    slot_bytes,
    store,
    stored_items,
    swap,
)

__all__ = [
    "Cache",
    "CommitContext",
    "Dense",
    "DenseSegment",
    "Geometry",
    "Heavy",
    "Items",
    "Kivi",
    "LowRank",
    "PerLayer",
    "Policy",
    "PushContext",
    "Ring",
    "Segment",
    "Sinks",
    "Slots",
    "StepContext",
    "Tier",
    "bytes_of",
    "chain_context",
    "full",
    "get",
    "h2o",
    "items_at",
    "less",
    "load",
    "new_slots",
    "per_layer",
    "put",
    "register_policy",
    "resolve",
    "slot_bytes",
    "store",
    "stored_items",
    "streaming",
    "swap",
    "write_index",
]
