"""The harness with fake peers: order of calls and statistics."""

import pytest

from bench.harness import interleave, ratio, timed


def fake(name, calls, rates):
    """A peer that notes its turn and reports the next of `rates`; the first call reports -1."""
    values = iter([-1.0, *rates])

    def measure():
        calls.append(name)
        return {"rate": next(values)}

    return measure


def test_peers_take_turns_and_the_first_call_of_each_is_not_a_round():
    calls = []
    peers = {"a": fake("a", calls, [1, 2]), "b": fake("b", calls, [3, 4])}
    samples = interleave(peers, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert samples["a"].values("rate") == [1, 2]
    assert samples["b"].first == {"rate": -1.0}


def test_ratios_compare_the_same_round():
    calls = []
    samples = interleave(
        {"ours": fake("a", calls, [2, 9, 4]), "peer": fake("b", calls, [1, 3, 4])}, rounds=3
    )
    found = ratio(samples["ours"], samples["peer"], "rate")
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [2.0, 3.0, 1.0]}


def test_zero_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleave({}, rounds=0)


def test_timer_returns_the_result_and_waits_for_arrays():
    import jax.numpy as jnp

    seconds, result = timed(lambda: {"x": jnp.ones(3) + 1})
    assert seconds >= 0 and result["x"].is_ready()
