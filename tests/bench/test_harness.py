"""The harness with fake peers: order of calls, statistics, records that survive a broken write."""

import json
import math

import pytest

from bench.environment import environment
from bench.harness import Record, append, interleave, latest, ratio, read_records, timed


def record(**changes) -> Record:
    fields = {"name": "decode", "config": {"batch": 1}, "metrics": {"a": 1.0}, "env": {}}
    return Record(**{**fields, "command": "python -m bench decode", "seed": 0, **changes})


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


def test_records_are_read_back_in_order(tmp_path):
    first, second = record(), record(seed=1)
    append(first, tmp_path)
    append(second, tmp_path)
    assert read_records(tmp_path) == [first, second]


def test_record_after_a_killed_write_starts_a_new_line(tmp_path):
    path = append(record(), tmp_path)
    with path.open("a") as file:
        file.write('{"name": "dec')
    append(record(seed=2), tmp_path)
    assert [r.seed for r in read_records(tmp_path)] == [0, 2]


def test_records_are_strict_json_with_every_field():
    line = record(metrics={"bad": math.nan, "rows": [math.inf, 1.23456789]}).to_json()
    data = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert data["metrics"] == {"bad": None, "rows": [None, 1.23457]}
    assert set(data) == {"name", "config", "metrics", "env", "command", "seed", "time"}


def test_latest_keeps_one_record_for_each_config():
    old, new, other = record(), record(metrics={"a": 2.0}), record(config={"batch": 8})
    assert latest([old, other, new]) == [new, other]


def test_environment_names_versions_and_machine_but_no_host_or_path():
    import platform

    env = environment()
    assert {"python", "jax", "jaxlib", "numpy", "torch", "transformers", "cpu", "cores"} <= set(env)
    text = json.dumps(env)
    assert "/" not in env["python"] + str(env["commit"])
    assert platform.node() not in text or len(platform.node()) < 4
