"""The server under load, in a process of its own."""

import pytest

from bench import load


@pytest.mark.slow
def test_a_server_stands_load_and_faults():
    found = dict(load.checks("tiny-llama", clients=64, disconnects=40, seed=0))
    restart = found.pop("kill and restart")
    assert restart["first_answer_s"] > 0  # how fast it is depends on the machine
    slow = found["surplus"].pop("slowest_refusal_ms")
    assert slow > 0
    assert found["surplus"]["answered"] + found["surplus"]["refused"] == 64
    assert all(found[name]["passed"] for name in ("disconnects", "drain")), found
