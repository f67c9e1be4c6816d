"""How many neurons of a feed-forward block are active. `hidden` is what `down` multiplies, with the
neurons as last axis."""

from typing import Any

SMALL = 0.01


def active(hidden: Any, share: float = SMALL) -> Any:
    """Which neurons of each token are active: above `share` of the token's largest in size. Of a
    ReLU those that are not zero or nearly so; a smooth activation has no zeros to count."""
    size = abs(hidden)
    return size > share * size.max(axis=-1, keepdims=True)


def sparsity(hidden: Any) -> Any:
    """The share of each token's neurons that are not active."""
    return 1 - active(hidden).mean(axis=-1)


def activity_overlap(hidden: Any) -> Any:
    """Which part of the neurons that are active in a token or the next are so in both, [..., T-1]
    of [..., T, F]; 1 where none is active."""
    now = active(hidden)
    both = (now[..., 1:, :] & now[..., :-1, :]).sum(axis=-1)
    either = (now[..., 1:, :] | now[..., :-1, :]).sum(axis=-1)
    xp = hidden.__array_namespace__()
    return xp.where(either > 0, both / xp.maximum(either, 1), 1.0)
