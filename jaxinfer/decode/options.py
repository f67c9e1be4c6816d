"""What a generation can be asked for, checked before anything is compiled."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxinfer.decode.sampling import Sampler

ENDLESS = 2**31 - 1  # tokens of a stream without end
KINDS = {int: "a whole number", bool: "True or False", Sampler: "a Sampler"}


class Asked(NamedTuple):
    """What is asked for one prompt."""

    sampler: Sampler
    max_new_tokens: int
    seed: int
    ignore_eos: bool
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `LM.generate`, `LM.stream`, `LM.chat` and of the same methods of a session.

    sampler (`Sampler`), max_new_tokens, seed (whole numbers), ignore_eos (go on to the limit): one
    for all prompts, or a list with one per prompt; a prompt's text depends on its own seed only.
    max_new_tokens=None streams without end, for policies of fixed memory. stop: a string or a list
    of strings that end every text, or, when the list holds a list, one entry (a string or a list of
    strings) per prompt; the name of a special token, such as "<|im_end|>", ends the text at that
    token. samples: completions per prompt; sample i of seed s draws with
    `fold_in(key(s), i)`, so sample 0 is what one sample gives. policy: cache policy (`ji.full()`, a
    name, a mapping, a list with one per layer). prefix: a `Session` whose tokens come before every
    prompt, read only once, under its own policy. draft: what guesses ahead, a smaller `LM`,
    "prompt-lookup" or an object of `ji.speculate`. sparsity: no method yet.
    """

    policy: Any = None
    sampler: Any = Sampler()
    max_new_tokens: Any = 64
    seed: Any = 0
    samples: Any = 1
    stop: Any = ()
    ignore_eos: Any = False
    prefix: Any = None
    draft: Any = None
    sparsity: Any = None
    limit: int | None = None  # emit fewer tokens than the buffers hold: warm-up

    def __post_init__(self):
        if self.sparsity is not None:
            raise ValueError(f"sparsity={self.sparsity!r} is not supported by this model object")
        object.__setattr__(self, "samples", _plain(self.samples))
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be a whole number, at least 1, got {self.samples!r}")

    def per_prompt(self, count: int) -> list[Asked]:
        """The options of each of `count` prompts."""
        limit = ENDLESS if self.max_new_tokens is None else self.max_new_tokens
        asked = zip(
            _each(self.sampler, count, Sampler, "sampler"),
            _each(limit, count, int, "max_new_tokens"),
            _each(self.seed, count, int, "seed"),
            _each(self.ignore_eos, count, bool, "ignore_eos"),
            _stops(self.stop, count),
            strict=True,
        )
        asked = [Asked(*one) for one in asked]
        for one in asked:
            if not 1 <= one.max_new_tokens <= ENDLESS:
                raise ValueError(
                    f"max_new_tokens must be from 1 to {ENDLESS}, got {one.max_new_tokens}"
                )
        return asked


def parse_options(options: dict[str, Any]) -> Options:
    known = Options.__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown generation options {unknown}; known are {sorted(known)}")
    return Options(**options)


def _each(value: Any, count: int, kind: type, name: str) -> list[Any]:
    """`count` values from one or a list of so many; arrays count as lists."""
    value = _plain(value)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(map(_plain, value)) if several else [value] * count
    for one in values:
        if not isinstance(one, kind) or (kind is int and isinstance(one, bool)):
            raise ValueError(
                f"{name} must be {KINDS[kind]}, or a list with one per prompt, got {value!r}"
            )
    _check_count(values, count, name)
    return values


def _stops(stop: Any, count: int) -> list[tuple[str, ...]]:
    one_each = isinstance(stop, list | tuple) and any(isinstance(s, list | tuple) for s in stop)
    if not one_each:
        return [_strings(stop)] * count
    _check_count(stop, count, "stop")
    return [_strings(entry) for entry in stop]


def _strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, Collection) or not all(isinstance(s, str) for s in strings):
        raise ValueError(
            f"stop must be a string or a list of strings, or a list of such lists with one per "
            f"prompt, got {stop!r}"
        )
    return tuple(strings)


def _check_count(values: Sequence[Any], count: int, name: str) -> None:
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries for {count} prompts; give one or one each"
        )


def _plain(value: Any) -> Any:
    """Arrays and their scalars as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value
