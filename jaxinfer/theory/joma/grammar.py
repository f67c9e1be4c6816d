"""A deterministic grammar: each symbol of a level is a set of symbols of the level below.

The repository of JoMA trains its hierarchy experiment (Table 1) on it. A class label expands to a
set of tokens, which are written in ascending order behind padding; so there are only as many inputs
as classes, which makes any measure of learned features too kind. `latent_tree` has no such limit.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.arguments import whole


@dataclass(frozen=True)
class Grammar:
    """Every class's symbols at every level.

    `inputs`: int32[C, T], the token M - 1 is padding. `latents`: bool[C, symbols] of each level
    from the one above the tokens to the classes themselves.
    """

    inputs: np.ndarray
    latents: tuple[np.ndarray, ...]
    tokens: int  # M, with padding

    @property
    def classes(self) -> int:
        return len(self.inputs)


def grammar(
    tokens: int = 20, length: int = 20, symbols: Sequence[int] = (20, 10),
    parts: Sequence[int] = (3, 3), *, seed: int = 0,
) -> Grammar:  # fmt: skip
    """A random grammar.

    Args:
        tokens: M, the last of them for padding.
        length: T, of every input.
        symbols: how many there are at each level above the tokens; the last are the classes.
        parts: of how many symbols of the level below one is a set, for each of these levels.
        seed: of the choice of sets, all different within a level.

    Raises:
        ValueError: if the sets cannot all be different, or a class has more than `length` tokens.
    """
    whole("tokens", tokens, 2)
    whole("length", length)
    if not symbols or len(symbols) != len(parts):
        raise ValueError(f"symbols and parts must have a number per level, got {symbols}, {parts}")
    rng = np.random.default_rng(seed)
    below = tokens - 1
    closures: list[np.ndarray] = []  # of each level: [symbols, tokens], which tokens are in it
    made: list[np.ndarray] = []  # [symbols, symbols of the level below]
    for count, size in zip(symbols, parts, strict=True):
        made.append(_different_sets(whole("symbols", count), whole("parts", size), below, rng))
        own = made[-1] if not closures else (made[-1].astype(int) @ closures[-1].astype(int)) > 0
        closures.append(own)
        below = count
    longest = int(closures[-1].sum(axis=1).max())
    if longest > length:
        raise ValueError(f"a class has {longest} tokens, which do not fit; raise length={length}")
    inputs = np.full((symbols[-1], length), tokens - 1, np.int32)
    for row, present in zip(inputs, closures[-1], strict=True):
        inside = np.flatnonzero(present)
        row[length - len(inside) :] = inside
    latents = [np.eye(len(inputs), dtype=bool)]
    for step in reversed(made[1:]):
        latents.append((latents[-1].astype(int) @ step.astype(int)) > 0)
    return Grammar(inputs, tuple(reversed(latents)), tokens)


def _different_sets(count: int, size: int, of: int, rng: np.random.Generator) -> np.ndarray:
    """`count` different sets of `size` out of `of`, bool[count, of]."""
    if size > of or math.comb(of, size) < count:
        raise ValueError(f"there are no {count} different sets of {size} out of {of}")
    if math.comb(of, size) <= 4 * count:
        every = np.array(list(itertools.combinations(range(of), size)))
        chosen = {tuple(row) for row in every[rng.permutation(len(every))[:count]]}
    else:
        chosen = set()
        while len(chosen) < count:
            chosen.add(tuple(np.sort(rng.choice(of, size, replace=False))))
    sets = np.zeros((count, of), bool)
    for row, members in zip(sets, sorted(chosen), strict=True):
        row[list(members)] = True
    return sets
