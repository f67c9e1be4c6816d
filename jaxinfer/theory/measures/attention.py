"""How attention spreads over keys. `weights` sum to 1 over the last axis, which are the keys."""

from typing import Any


def entropy(weights: Any) -> Any:
    """-sum p ln p in nats, without the last axis; a weight of 0 adds nothing."""
    xp = weights.__array_namespace__()
    positive = weights > 0
    return -xp.where(positive, weights * xp.log(xp.where(positive, weights, 1)), 0).sum(axis=-1)


def relative_entropy(weights: Any, keys: Any) -> Any:
    """Entropy over the largest possible, ln `keys`; 0 where there is one key.

    Args:
        weights: attention [..., S].
        keys: how many keys each query may see, int [...].
    """
    xp = weights.__array_namespace__()
    most = xp.log(xp.maximum(keys, 2) * 1.0)
    return xp.where(keys > 1, entropy(weights) / most, 0.0)


def effective_keys(weights: Any) -> Any:
    """exp of the entropy: over how many keys uniform attention would be as spread."""
    return weights.__array_namespace__().exp(entropy(weights))


def sink_mass(weights: Any, sinks: int = 4) -> Any:
    """What the first `sinks` keys receive."""
    return weights[..., :sinks].sum(axis=-1)


def top_mass(weights: Any, k: int) -> Any:
    """What the `k` largest weights of each query add up to."""
    xp = weights.__array_namespace__()
    return xp.sort(weights, axis=-1)[..., -min(k, weights.shape[-1]) :].sum(axis=-1)


def heavy_hitter_overlap(first: Any, second: Any, share: float = 0.1) -> Any:
    """Which part of the keys that received most in `first` also did in `second`.

    Args:
        first: attention received by each key, summed over some queries, [..., S].
        second: the same over other queries.
        share: how many keys count as heavy hitters, a share of S (one at least).
    """
    xp = first.__array_namespace__()
    count = max(1, round(share * first.shape[-1]))

    def heavy(mass: Any) -> Any:
        rank = xp.argsort(xp.argsort(-mass, axis=-1), axis=-1)
        return rank < count

    return (heavy(first) & heavy(second)).sum(axis=-1) / count
