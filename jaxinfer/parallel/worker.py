"""One stage as a process: `python -m jaxinfer.parallel.worker`, told what to do on standard input.

A first line of JSON says which layers of which model it serves and where its controller is. The
process loads them, opens a port and connects to the controller. From then on everything arrives as
messages and is handled in order by one thread: the controller's, and those of the stage before,
whose results go to the stage behind. Stages are wired anew after every loss, under a new number
(the incarnation); what was sent before is ignored. The process ends with its controller, and if its
own computation fails: a process that has lost its caches must not answer.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxinfer.parallel.message import Message
from jaxinfer.parallel.stage import OutOfStep, Stage
from jaxinfer.parallel.transport import Closed, Connection, Delay, Listener, connect
from jaxinfer.typing import Json

LOST = Message("lost", {})


class Worker:
    """The messages of a stage.

    Args:
      stage: what computes.
      control: the connection to the controller.
      secret: what connections of the pipeline begin with.
      delay: of the links between stages.
    """

    def __init__(self, stage: Stage, control: Connection, secret: str, delay: Delay):
        self._stage, self._control, self._secret, self._delay = stage, control, secret, delay
        self._inbox: queue.SimpleQueue[tuple[int | None, Message]] = queue.SimpleQueue()
        self._incarnation = -1
        self._behind: Connection | None = None
        self._handlers: dict[str, Callable[[Json, tuple[np.ndarray, ...]], Any]] = {
            "prefill": self._prefill,
            "step": self._step,
            "insert": lambda fields, _: stage.insert(*_whole(fields, "request", "group", "row")),
            "free": lambda fields, _: stage.free(*_whole(fields, "group", "row")),
            "drop": lambda fields, _: stage.drop(*_whole(fields, "request")),
        }

    def serve(self) -> None:
        """Handles messages until the controller is gone."""
        threading.Thread(target=self._hear_controller, daemon=True).start()
        while True:
            incarnation, message = self._inbox.get()
            if incarnation is None:
                if message.what == "ring":
                    self._join(message.fields)
                elif message.what == "stop":
                    return
            elif incarnation == self._incarnation:
                self._pass_on(message)

    def taken(self, connection: Connection, who: Json) -> None:
        """Hears the stage before, or the controller in front of the first stage."""
        incarnation = who.get("incarnation")
        while isinstance(incarnation, int):
            try:
                message = connection.receive()
            except Closed:
                message = LOST
            self._inbox.put((incarnation, message))
            if message is LOST:
                return

    def _hear_controller(self) -> None:
        while True:
            try:
                message = self._control.receive()
                if message.what == "ping":  # answered at once, whatever is computed
                    self._control.send(Message("pong", {}))
                    continue
            except Closed:
                os._exit(0)  # nobody is there to serve
            self._inbox.put((None, message))

    def _join(self, fields: Json) -> None:
        """Takes its place in a new ring, with empty caches."""
        if self._behind is not None:
            self._behind.close()
        self._incarnation = fields["incarnation"]
        self._stage.clear()
        host, port = fields["next"]
        try:
            self._behind = connect(
                (host, port), self._secret, delay=self._delay, role="data",
                incarnation=self._incarnation,
            )  # fmt: skip
        except Closed:
            self._lose()
            return
        self._control.send(Message("ready", {"incarnation": self._incarnation}))

    def _pass_on(self, message: Message) -> None:
        handler = self._handlers.get(message.what)
        try:
            if message is LOST:
                self._lose()
                return
            result = message
            if handler is not None:
                y = handler(message.fields, message.arrays)
                if y is not None:
                    result = message._replace(arrays=(np.asarray(y),))
                elif self._stage.ends[1]:
                    return  # nobody waits for it
            assert self._behind is not None
            self._behind.send(result)
        except OutOfStep as error:
            self._refuse(str(error))
        except Closed:
            self._lose()

    def _refuse(self, why: str) -> None:
        assert self._behind is not None
        try:
            self._behind.send(Message("refused", {"why": why}))
        except Closed:
            self._lose()

    def _lose(self) -> None:
        """Says that a neighbour is gone, and does nothing until it is told to join again."""
        self._control.send(Message("lost", {"incarnation": self._incarnation}))
        self._incarnation = -1

    def _prefill(self, fields: Json, arrays: tuple[np.ndarray, ...]) -> Any:
        names = ("request", "count", "position", "prompt")
        request, count, position, prompt = _whole(fields, *names)
        return self._stage.prefill(request, arrays[0], count, position, prompt)

    def _step(self, fields: Json, arrays: tuple[np.ndarray, ...]) -> Any:
        (group,) = _whole(fields, "group")
        return self._stage.step(group, arrays[0], fields["active"], fields["positions"])


def _whole(fields: Json, *names: str) -> list[int]:
    return [int(fields[name]) for name in names]


def make_stage(given: Json) -> tuple[Stage, str]:
    """The stage that a controller asks for, and the identity of its weights."""
    from jaxinfer.cache.presets import resolve
    from jaxinfer.io.load import load_checkpoint
    from jaxinfer.models.fingerprint import identity
    from jaxinfer.parallel.shard import mesh_of
    from jaxinfer.runtime.compilation_cache import enable_persistent_cache

    enable_persistent_cache()
    layers = range(*given["layers"])
    found = load_checkpoint(given["source"], given["dtype"], layers=layers)
    policy = resolve(given["policy"]).sized(given["sized"])
    stage = Stage(
        found.config, found.params, layers, policy=policy, capacity=given["capacity"],
        groups=given["groups"], rows=given["rows"], mesh=mesh_of(given["degree"]),
    )  # fmt: skip
    return stage, identity(found.config, found.params)


def main() -> None:
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    secret, delay = given["secret"], Delay(**given["delay"])
    control = connect(tuple(given["controller"]), secret, role="stage", number=given["number"])
    try:
        stage, weights = make_stage(given)
        worker = Worker(stage, control, secret, delay)
        listener = Listener(secret, worker.taken, delay=delay)
        control.send(Message("loaded", {"port": listener.address[1], "weights": weights}))
        worker.serve()
    except Exception as error:
        if not isinstance(error, ValueError):  # which says all there is to say
            traceback.print_exc()
        control.send(Message("failed", {"error": f"{type(error).__name__}: {error}"[:2000]}))
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # no thread of a runtime may keep it


def _end_with_parent() -> None:
    """Standard input ends when the process that started this one does."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
