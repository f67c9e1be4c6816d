"""How large a cache has to be, and whether it fits: both refused before anything is compiled."""

import warnings

from jaxinfer.cache.policy import Policy
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket, prefill_chunk
from jaxinfer.decode.model import Model
from jaxinfer.models.stack import cache_bytes_per_row, cache_geometry, check_cache
from jaxinfer.runtime import memory

ENDLESS = 2**31 - 1  # tokens of a stream without end
ENDLESS_BUFFER = 64  # token buffer of an endless stream, which the loop fills in circles
LONGEST = 2**30  # tokens of any other text: the largest buffer that 32-bit indices reach


def capacity_for(model: Model, policy: Policy, context: int, new: int) -> int:
    """The cache bucket for so many tokens; refuses what learned positions cannot reach, and an
    endless text in a cache that grows."""
    if new == ENDLESS and not policy.endless:
        raise ValueError(
            f"policy {policy.name!r} cannot go on for ever: its memory or its positions grow; "
            "choose streaming, or give max_new_tokens"
        )
    if policy.endless:
        policy.warn_beyond(model.config.max_positions)
        return SMALLEST_CAPACITY
    most = model.config.max_positions
    if context + new > most:
        message = f"{context} tokens exceed the model's {most} positions; read fewer"
        if new:
            message = (
                f"{context} context + {new} new tokens exceed the model's {most} positions; "
                "shorten the prompt or lower max_new_tokens"
            )
        if model.config.positions == "learned":
            raise ValueError(message)
        warnings.warn(
            f"{message}, or choose the policy streaming: what lies beyond them is not what the "
            "model was trained for",
            stacklevel=2,
        )
    grows = not policy.fixed_size
    capacity = bucket(context + new, SMALLEST_CAPACITY) if grows else SMALLEST_CAPACITY
    policy.check_room(capacity, context, new)
    return capacity


def check_fits(
    model: Model,
    policy: Policy,
    batch: int,
    capacity: int,
    tokens: int,
    *,
    new: int = 0,
    allocates: bool = True,
) -> None:
    """Refuses, before anything is compiled, what cannot fit in memory.

    Args:
      model, policy, batch, capacity: whose cache it is.
      tokens: read at once.
      new: tokens that each row generates at most.
      allocates: False when the cache is there already.
    """
    cfg = model.config
    geometry = cache_geometry(cfg, capacity, model.engine.dtype, model.engine.backend)
    layers = policy.layer_policies(cfg.num_layers)
    check_cache(cfg, policy, geometry, model.params)
    chunk = prefill_chunk(layers)
    parts = memory.estimate(
        cfg,
        cache_bytes=batch * cache_bytes_per_row(cfg, policy, geometry, model.params) * allocates,
        batch=batch,
        tokens=min(tokens, chunk),
        new=ENDLESS_BUFFER if new == ENDLESS else bucket(new, 1) if new else 0,
        block=min(geometry.backend.block or capacity, capacity),
    )
    memory.check_available(parts)
