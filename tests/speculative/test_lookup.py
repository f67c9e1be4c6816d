"""Prompt lookup against a search in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.decode.sampling import Sampler, SamplerRows
from jaxinfer.speculative.lookup import LookupDrafter, LookupState
from jaxinfer.speculative.topology import Topology

ROOM, LONGEST = 24, 4
CHAIN = Topology.chain(4)  # the root and three guesses
DRAFTER = LookupDrafter(longest=LONGEST)


@jax.jit
def _propose(history, length):
    state, root = LookupState(history, length), history[0, length[0] - 1][None]
    sampler, keys = SamplerRows.of([Sampler()], 64), jax.random.split(jax.random.key(0), 1)
    seen = jnp.zeros((1, 1), jnp.int32)
    return DRAFTER.propose({}, CHAIN, sampler, keys, state, root, seen)[0].tokens


def proposed(text: list[int]) -> list[int]:
    """The tokens below the root, which is the last one of the text."""
    history = np.zeros((1, ROOM), np.int32)
    history[0, : len(text)] = text
    return np.asarray(_propose(jnp.asarray(history), jnp.asarray([len(text)])))[0, 1:].tolist()


def found(text: list[int]) -> list[int] | None:
    """What followed the latest of the longest earlier matches of the text's end."""
    for size in range(min(LONGEST, len(text) - 1), 0, -1):
        for end in range(len(text) - 2, size - 2, -1):
            if text[end - size + 1 : end + 1] == text[-size:]:
                after = text[end + 1 :]
                return [after[i % len(after)] for i in range(CHAIN.nodes - 1)]
    return None


def test_a_match_is_a_run_without_gaps():
    # 1 9 3 and 2 3 both share two tokens with the end 1 2 3, but only 2 3 is a run
    text = [2, 3, 50, 51, 52, 1, 9, 3, 60, 61, 62, 1, 2, 3]
    assert proposed(text) == [50, 51, 52]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=ROOM))
def test_guesses_are_those_of_a_search(text):
    expected = found(text)
    if expected is not None:
        assert proposed(text) == expected
