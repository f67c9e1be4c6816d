"""What a generation can be asked for, checked before anything is compiled."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeGuard, TypeVar

import jax
import numpy as np

from jaxinfer.arguments import shown
from jaxinfer.cache.policy import Policy
from jaxinfer.decode.capacity import ENDLESS, LONGEST
from jaxinfer.decode.model import plain
from jaxinfer.decode.prefix import Prefix
from jaxinfer.decode.sampling import GREEDY, Sampler
from jaxinfer.decode.settings import SEEDS
from jaxinfer.decode.speculation import Draft

Samplers: TypeAlias = Sampler | Sequence[Sampler]
"""A sampler for all prompts, or one each."""

Integers: TypeAlias = int | Sequence[int] | np.ndarray | jax.Array
"""A whole number for all prompts, or one each."""

Flags: TypeAlias = bool | Sequence[bool] | np.ndarray | jax.Array
"""True or False for all prompts, or one each."""

Stop: TypeAlias = str | Sequence[str | Sequence[str]] | None
"""Strings that end a text: one or several for all prompts, or, when the list holds a list, one
entry (a string or a list of strings) each."""

KINDS = {int: "a whole number", bool: "True or False", Sampler: "a Sampler"}
Kind = TypeVar("Kind")


class Asked(NamedTuple):
    """What is asked for one prompt."""

    sampler: Sampler
    max_new_tokens: int
    seed: int
    ignore_eos: bool
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `jaxinfer.lm.LM.generate`, with objects in place of names; the form of the
    model that `sparsity` asks for is the model that runs.

    policy: None is `full()`, or the prefix's own. draft: None decodes token by token. limit: emit
    fewer tokens than the buffers hold, for warm-up.
    """

    policy: Policy | None = None
    sampler: Samplers = GREEDY
    max_new_tokens: Integers | None = 64
    seed: Integers = 0
    samples: int = 1
    stop: Stop = ()
    ignore_eos: Flags = False
    prefix: Prefix | None = None
    draft: Draft | None = None
    limit: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "samples", plain(self.samples))
        if not isinstance(self.samples, int) or not 1 <= self.samples <= LONGEST:
            raise ValueError(
                f"samples must be a whole number from 1 to {LONGEST}, got {shown(self.samples)}"
            )

    def per_prompt(self, count: int) -> list[Asked]:
        """The options of each of `count` prompts."""
        limit = ENDLESS if self.max_new_tokens is None else self.max_new_tokens
        rows = zip(
            _each(self.sampler, count, Sampler, "sampler"),
            _each(limit, count, int, "max_new_tokens"),
            _each(self.seed, count, int, "seed"),
            _each(self.ignore_eos, count, bool, "ignore_eos"),
            _stops(self.stop, count),
            strict=True,
        )
        asked = [Asked(*row) for row in rows]
        for one in asked:
            if not 1 <= one.max_new_tokens <= LONGEST and self.max_new_tokens is not None:
                raise ValueError(
                    f"max_new_tokens must be from 1 to {LONGEST}, got {one.max_new_tokens}"
                )
            if one.seed not in SEEDS:
                raise ValueError(f"seed must be from -2**63 to 2**63 - 1, got {one.seed}")
        return asked


def _each(value: object, count: int, kind: type[Kind], name: str) -> list[Kind]:
    """`count` values from one or a list of so many; arrays count as lists."""
    value = plain(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        given = [plain(one) for one in value]
    else:
        given = [value] * count
    values = [one for one in given if _is_a(one, kind)]
    if len(values) < len(given):
        raise ValueError(
            f"{name} must be {KINDS[kind]}, or a list with one per prompt, got {shown(value)}"
        )
    _check_count(values, count, name)
    return values


def _is_a(value: object, kind: type[Kind]) -> TypeGuard[Kind]:
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _stops(stop: Stop, count: int) -> list[tuple[str, ...]]:
    if isinstance(stop, list | tuple) and any(isinstance(s, list | tuple) for s in stop):
        _check_count(stop, count, "stop")
        return [_strings(entry) for entry in stop]
    return [_strings(stop)] * count


def _strings(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    strings = _list_of_strings(stop)
    if strings is None:
        raise ValueError(
            f"stop must be a string or a list of strings, or a list of such lists with one per "
            f"prompt, got {shown(stop)}"
        )
    return strings


def _list_of_strings(given: object) -> tuple[str, ...] | None:
    if not isinstance(given, Sequence | Set) or isinstance(given, bytes):
        return None
    strings = tuple(s for s in given if isinstance(s, str))
    return strings if len(strings) == len(given) else None


def _check_count(values: Sequence[object], count: int, name: str) -> None:
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries for {count} prompts; give one or one each"
        )
