"""Workers: requests and replies, errors of the peer, and processes that die or hang."""

import sys

import pytest

from bench.worker import PeerError, Worker

FAKE = """
import os, sys, time
from bench.worker import serve

def hang():
    time.sleep(60)

def die():
    print("out of luck", file=sys.stderr, flush=True)
    os._exit(3)

def fail():
    raise ValueError("no\\nsuch thing")

def add(a, b):
    print("chatter on standard output")
    return a + b

serve({"add": add, "fail": fail, "die": die, "hang": hang,
       "policy": lambda: os.environ.get("OMP_WAIT_POLICY")})
"""


@pytest.fixture
def worker():
    with Worker("fake", [sys.executable, "-c", FAKE]) as started:
        yield started


def test_replies_are_kept_apart_from_what_the_peer_prints(worker):
    assert [worker.call("add", a=1, b=i) for i in range(3)] == [1, 2, 3]


def test_an_error_of_a_handler_is_one_line_and_the_worker_lives_on(worker):
    with pytest.raises(PeerError, match="^fake: ValueError: no such thing$"):
        worker.call("fail")
    assert worker.call("add", a=1, b=1) == 2


def test_a_dead_worker_is_reported_with_its_last_line(worker):
    with pytest.raises(PeerError, match="fake: process ended with 3 during die: out of luck"):
        worker.call("die")


def test_a_worker_that_takes_too_long_is_killed(worker):
    with pytest.raises(PeerError, match="process ended with -9 during hang"):
        worker.call("hang", timeout_s=0.2)


def test_workers_wait_passively(worker):
    assert worker.call("policy") == "PASSIVE"
