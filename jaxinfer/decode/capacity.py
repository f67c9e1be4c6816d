"""How large a cache has to be, and whether it fits: both refused before anything is compiled."""

import warnings

from jaxinfer.cache.policy import Policy
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket, prefill_chunk
from jaxinfer.decode.model import Model
from jaxinfer.models.mixers import mixers_of
from jaxinfer.models.reach import reach
from jaxinfer.models.stack import (
    cache_bytes_per_row,
    cache_geometry,
    check_cache,
    layer_policies,
)
from jaxinfer.runtime import memory

ENDLESS = 2**31 - 1  # tokens of a stream without end
ENDLESS_BUFFER = 64  # token buffer of an endless stream, which the loop fills in circles
LONGEST = 2**30  # tokens of any other text: the largest buffer that 32-bit indices reach


def is_endless(model: Model, policy: Policy) -> bool:
    """Whether a text may go on for ever: policies concern attention, other layers have their own
    way to keep it."""
    return all(layer.endless for layer in _layers(model, policy))


def is_fixed_size(model: Model, policy: Policy) -> bool:
    """Whether the memory of a row does not depend on its tokens."""
    return all(layer.fixed_size for layer in _layers(model, policy))


def check_room(model: Model, policy: Policy, capacity: int, prompt: int, new: int) -> None:
    """Refuses more new tokens behind a prompt than a layer has room for."""
    for layer in _layers(model, policy):
        layer.check_room(capacity, prompt, new)


def _layers(model: Model, policy: Policy) -> dict[Policy, None]:
    return dict.fromkeys(layer_policies(model.config, policy, model.params))


def capacity_for(model: Model, policy: Policy, context: int, new: int) -> int:
    """The cache bucket for so many tokens; refuses what learned positions cannot reach, and an
    endless text in a cache that grows."""
    endless = is_endless(model, policy)
    if new == ENDLESS and policy.endless and not endless:
        raise ValueError(
            "the model's layers of long convolutions keep every token; give max_new_tokens, or "
            "distil their filters to modes"
        )
    if new == ENDLESS and not endless:
        raise ValueError(
            f"policy {policy.name!r} cannot go on for ever: its memory or its positions grow; "
            "choose streaming, or give max_new_tokens"
        )
    if endless and (policy.endless or new == ENDLESS):
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
        if reach(model.config) is not None:
            raise ValueError(message)
        other = "" if endless else ", or choose the policy streaming"
        warnings.warn(
            f"{message}{other}: what lies beyond them is not what the model was trained for",
            stacklevel=2,
        )
    grows = not is_fixed_size(model, policy)
    capacity = bucket(context + new, SMALLEST_CAPACITY) if grows else SMALLEST_CAPACITY
    check_room(model, policy, capacity, context, new)
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
    check_cache(cfg, policy, geometry, model.params)
    chunk = prefill_chunk(layer_policies(cfg, policy, model.params))
    block, read = min(geometry.backend.block or capacity, capacity), min(tokens, chunk)
    parts = memory.estimate(
        cfg,
        cache_bytes=batch * cache_bytes_per_row(cfg, policy, geometry, model.params) * allocates,
        batch=batch,
        tokens=read,
        new=ENDLESS_BUFFER if new == ENDLESS else bucket(new, 1) if new else 0,
        mixer=max(mixer.floats_per_token(cfg, block + read) for mixer in mixers_of(cfg)),
    )
    memory.check_available(parts)
