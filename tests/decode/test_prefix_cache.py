"""The radix tree finds what a search through all snapshots finds, and keeps to its budget."""

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from jaxinfer.decode.prefix_cache import Found, PrefixCache

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
STEPS = st.lists(st.tuples(st.booleans(), TEXTS), max_size=30)


def common(one, other) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


class Plain:
    """The same in a list of texts, the least recently used first."""

    def __init__(self, budget: int, truncates: bool):
        self.budget, self.truncates, self.texts = budget, truncates, []

    def longest(self, tokens) -> int:
        found = [common(text, tokens) for text in self.texts]
        if not self.truncates:
            found = [n for n, text in zip(found, self.texts, strict=True) if n == len(text)]
        return max(found, default=0)


@pytest.mark.parametrize("truncates", [False, True])
@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_it_finds_the_longest_snapshot(truncates, steps):
    cache, plain = PrefixCache(1 << 20, truncates=truncates), Plain(1 << 20, truncates)
    for puts, tokens in steps:
        if puts:
            cache.put("", tokens, tokens, 1)
            plain.texts.append(tokens)
        found, expected = cache.find("", tokens), plain.longest(tokens)
        assert (0 if found is None else found.length) == expected
        if found is not None:
            assert found.held[: found.length] == tokens[: found.length]
            assert truncates or len(found.held) == found.length


@given(steps=STEPS, budget=st.integers(1, 5))
@example(steps=[(True, (1,)), (True, (0,)), (True, (1, 0))], budget=2)
@settings(max_examples=150, deadline=None)
def test_the_least_recently_used_goes_first(steps, budget):
    cache, used = PrefixCache(budget, truncates=False), []
    for puts, tokens in steps:
        if puts:
            cache.put("", tokens, tokens, 1)
            used = [*(text for text in used if text != tokens), tokens][-budget:]
        else:
            found = cache.find("", tokens)
            if found is not None:
                used = [*(text for text in used if text != found.held), found.held]
        assert cache.bytes == len(cache) == len(used)
    for text in used:
        found = cache.find("", text)
        assert found is not None and found.held == text
    cache.clear()
    assert cache.bytes == len(cache) == 0


def test_scopes_share_the_budget_and_nothing_else():
    cache = PrefixCache(3, truncates=True)
    cache.put("one", (1, 2, 3), "a", 2)
    assert cache.find("other", (1, 2, 3)) is None
    cache.put("other", (1, 2, 3), "b", 2)
    assert cache.find("one", (1, 2, 3)) is None and list(cache._roots) == ["other"]
    cache.put("other", (4,), "too large", 4)
    assert len(cache) == 1


def test_a_longer_snapshot_takes_the_place_of_those_that_it_covers():
    cache = PrefixCache(10, truncates=True)
    cache.put("", (1, 2), "short", 1)
    cache.put("", (1, 2, 3), "long", 1)
    cache.put("", (1,), "covered", 1)
    assert len(cache) == 1 and cache.find("", (1, 2, 9)) == Found("long", 2)
