"""Cache policies by name, as users choose them.

Every preset is a function that returns a frozen `Policy`; `resolve` also takes the names of the
command line and mappings such as `{"name": "full"}`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.cache.base import Policy
from jaxinfer.cache.dense import Dense


def full() -> Policy:
    """Keeps every token in full precision: `2 * K * H * itemsize` bytes per token and layer."""
    return Policy(name="full", tiers=(Dense(),))


PRESETS: dict[str, Callable[..., Policy]] = {"full": full}


def resolve(policy: Policy | str | Mapping[str, Any] | None) -> Policy:
    """A policy from a policy, a preset's name, a mapping with `name` and arguments, or None
    (full)."""
    if policy is None:
        return full()
    if isinstance(policy, Policy):
        return policy
    arguments = {"name": policy} if isinstance(policy, str) else dict(policy)
    name = arguments.pop("name", None)
    if name not in PRESETS:
        raise ValueError(f"unknown cache policy {name!r}; known policies: {', '.join(PRESETS)}")
    try:
        return PRESETS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"policy {name!r} does not take these arguments: {error}") from None
