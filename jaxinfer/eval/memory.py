"""What a policy needs in memory for a text, and the simplest policy that fits into the same bytes.

A compressed cache is only worth its loss if it beats keeping fewer tokens in full precision, so
every table has a baseline with the same bytes: a window with sinks (arXiv 2309.17453), heavy
hitters (arXiv 2306.14048), or just the last tokens.
"""

from collections.abc import Callable

from jaxinfer.arguments import shown
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.policy import PerLayer, Policy
from jaxinfer.cache.presets import PolicyLike, h2o, resolve, streaming
from jaxinfer.decode.model import Model
from jaxinfer.models.mixers import mixers_of
from jaxinfer.models.stack import cache_bytes_per_row, cache_geometry, layer_policies

SINKS = 4


def policy_bytes(lm: Model, policy: PolicyLike, length: int, dtype: str | None = None) -> int:
    """Bytes of one row's cache for a text of `length` tokens, all layers, in `dtype` (default: the
    model's); budgets given as shares are shares of `length`."""
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    policy = resolve(policy).sized(length)
    geometry = cache_geometry(lm.config, length, dtype or lm.engine.dtype, lm.engine.backend)
    return cache_bytes_per_row(lm.config, policy, geometry, lm.params)


def layer_bytes(lm: Model, policy: PolicyLike, length: int) -> list[int]:
    """`policy_bytes` layer by layer."""
    policy = resolve(policy).sized(length)
    geometry = cache_geometry(lm.config, length, lm.engine.dtype, lm.engine.backend)
    pairs = zip(mixers_of(lm.config), layer_policies(lm.config, policy, lm.params), strict=True)
    return [mixer.bytes_per_row(lm.config, one, geometry) for mixer, one in pairs]


def kept_in_full(policy: PolicyLike, length: int) -> int | None:
    """How many tokens of a text of `length` the policy keeps as they are, with all their attention;
    None is any number. What fits into them is read as the full cache reads it."""
    policy = resolve(policy).sized(length)
    if isinstance(policy, PerLayer):
        fewest = [
            n for n in (kept_in_full(layer, length) for layer in policy.layers) if n is not None
        ]
        return min(fewest, default=None)
    kept = 0
    for tier in policy.tiers:
        if isinstance(tier, Dense):
            return None
        kept += tier.residual if isinstance(tier, Kivi) else getattr(tier, "size", 0)
    return kept


def bytes_per_token(lm: Model, policy: PolicyLike, length: int) -> float:
    """`policy_bytes` per token of the text."""
    return policy_bytes(lm, policy, length) / length


def equal_memory(lm: Model, policy: PolicyLike, length: int, kind: str = "streaming") -> Policy:
    """The baseline of this kind that keeps as many tokens as fit into the policy's bytes for a
    text of `length` tokens, at most `length`."""
    makers: dict[str, tuple[int, Callable[[int], Policy]]] = {
        "streaming": (SINKS + 1, lambda kept: streaming(SINKS, kept - SINKS)),
        "window": (1, lambda kept: streaming(0, kept)),
        "h2o": (2, lambda kept: h2o(kept // 2, kept - kept // 2)),
    }
    if kind not in makers:
        raise ValueError(f"the baseline must be one of {', '.join(makers)}, got {shown(kind)}")
    fewest, make = makers[kind]
    budget = policy_bytes(lm, policy, length)
    need = policy_bytes(lm, make(fewest), length)
    if need > budget:
        raise ValueError(
            f"a {kind} baseline needs at least {need} bytes, the policy has {budget} for {length} "
            "tokens; take a longer text or another baseline"
        )
    low, high = fewest, max(length, fewest)
    while low < high:
        middle = (low + high + 1) // 2
        if policy_bytes(lm, make(middle), length) <= budget:
            low = middle
        else:
            high = middle - 1
    return make(low)
