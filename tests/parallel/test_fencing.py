"""Late, doubled and foreign messages, without processes: hexgen.md 5.5."""

import contextlib
import queue
import threading

import numpy as np
import pytest

from jaxinfer.cache.presets import full
from jaxinfer.models.part import part_of
from jaxinfer.parallel.message import Message
from jaxinfer.parallel.stage import OutOfStep, Stage
from jaxinfer.parallel.transport import Closed, Delay, Listener, LocalConnection
from jaxinfer.parallel.worker import Worker
from tests.factories import CONFIGS, params_of

CFG = CONFIGS["llama"]
PROMPT = np.arange(16, dtype=np.int32)[None]
TOKEN = np.full((2, 1), 3, np.int32)


@pytest.fixture(scope="module")
def made():
    layers = range(2)
    params = part_of(CFG, params_of("llama"), layers)
    return Stage(CFG, params, layers, policy=full(), capacity=64, groups=2, rows=2)


@pytest.fixture
def stage(made):
    made.clear()
    return made


def read(stage, request=1, group=0, row=1):
    stage.prefill(request, PROMPT, 10, 0, 10)
    stage.insert(request, group, row)


def test_a_late_or_doubled_step_is_refused_and_changes_nothing(stage):
    read(stage)
    first = np.asarray(stage.step(0, TOKEN, [1], [10]))
    before = stage.export_row(0, 1)
    for positions in ([10], [12], [0]):
        with pytest.raises(OutOfStep, match=r"rows \[1\] hold \[11\] tokens"):
            stage.step(0, TOKEN, [1], positions)
    for was, now in zip(before, stage.export_row(0, 1), strict=True):
        np.testing.assert_array_equal(was, now)
    stage.clear()
    read(stage)
    np.testing.assert_array_equal(first, np.asarray(stage.step(0, TOKEN, [1], [10])))


def test_a_piece_of_a_prompt_out_of_order_is_refused(stage):
    with pytest.raises(OutOfStep, match="has read -1 tokens, not 4"):
        stage.prefill(7, PROMPT, 4, 4, 8)
    stage.prefill(7, PROMPT, 4, 0, 8)
    with pytest.raises(OutOfStep, match="has read 4 tokens, not 8"):
        stage.prefill(7, PROMPT, 4, 8, 12)
    stage.drop(7)
    with pytest.raises(OutOfStep, match="has read nothing"):
        stage.insert(7, 0, 0)


def test_a_freed_row_is_empty_and_others_stay(stage):
    read(stage, 1, 0, 0)
    read(stage, 2, 0, 1)
    stage.free(0, 0)
    stage.step(0, TOKEN, [1], [10])
    with pytest.raises(OutOfStep, match=r"hold \[0\]"):
        stage.step(0, TOKEN, [0], [10])


def test_a_row_of_another_form_is_refused(stage):
    read(stage)
    row = stage.export_row(0, 1)
    with pytest.raises(ValueError, match="both stages need the same"):
        stage.import_row(3, row[:-1])
    with pytest.raises(ValueError, match="both stages need the same"):
        stage.import_row(3, [x.astype(np.float64) for x in row])


class Around:
    """A worker of a stage in this process, with a controller before and behind it."""

    def __init__(self, stage):
        self.back = queue.SimpleQueue()
        self.listener = Listener("secret", lambda connection, who: self._hear(connection))
        self.control, own = LocalConnection.pair()
        self.worker = Worker(stage, own, "secret", Delay())
        self.thread = threading.Thread(target=self.worker.serve, daemon=True)
        self.thread.start()

    def _hear(self, connection):
        with contextlib.suppress(Closed):
            while True:
                self.back.put(connection.receive())

    def join(self, incarnation):
        """The worker's new ring; and the connection of what sends to it there."""
        fields = {"incarnation": incarnation, "next": list(self.listener.address)}
        self.control.send(Message("ring", fields))
        assert self.control.receive(10) == Message("ready", {"incarnation": incarnation})
        near, far = LocalConnection.pair()
        who = {"incarnation": incarnation}
        threading.Thread(target=self.worker.taken, args=(far, who), daemon=True).start()
        return near


def test_what_an_earlier_ring_sent_does_not_count(stage):
    around = Around(stage)
    piece = Message("prefill", {"request": 1, "count": 10, "position": 0, "prompt": 10}, (PROMPT,))
    step = Message("step", {"group": 0, "active": [1], "positions": [10]}, (TOKEN,))
    first = around.join(1)
    first.send(piece)
    assert around.back.get(timeout=30).arrays[0].shape == (1, 1, CFG.vocab_size)
    first.send(Message("insert", {"request": 1, "group": 0, "row": 1}))
    second = around.join(2)
    first.send(step)  # late: the row is gone with the ring that it was made in
    first.close()
    second.send(step)
    refused = around.back.get(timeout=30)
    assert refused.what == "refused" and "hold [0] tokens, not [10]" in refused.fields["why"]
    second.send(piece)
    assert around.back.get(timeout=30).what == "prefill"
    assert around.back.empty()
    around.control.send(Message("ping", {}))
    assert around.control.receive(10).what == "pong"
    second.close()
    assert around.control.receive(10) == Message("lost", {"incarnation": 2})
    around.control.send(Message("stop", {}))
    around.thread.join(10)
    assert not around.thread.is_alive()
    around.listener.close()
