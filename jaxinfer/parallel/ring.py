"""`Ring`: a controller's side of a pipeline. Messages go to the first stage, through all of them,
and come back from the last.

A ring has a number, its incarnation. After a loss the stages that died are started again, all are
wired anew under the next number, and every stage begins with empty caches: nothing that an earlier
ring sent can arrive in a later one. What was in the caches is for the caller to put back.
"""

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from jaxinfer.parallel.message import Message
from jaxinfer.parallel.processes import Launcher, LocalLauncher, Process
from jaxinfer.parallel.transport import Closed, Delay, Listener, TcpConnection, connect
from jaxinfer.typing import Json

POLL_S = 0.1
LAST_WORD_S = 1.0  # in which what a process said before its end arrives


class StageLost(RuntimeError):
    """A stage is gone, or a message was refused: the caches of the ring are not to be trusted."""


class _Member:
    """A stage as its controller sees it."""

    def __init__(self, process: Process):
        self.process = process
        self.control: TcpConnection | None = None
        self.port: int | None = None
        self.ready = -1  # the last incarnation that it has joined
        self.error: str | None = None
        self.weights = ""
        self.heard = time.monotonic()


class Ring:
    """The stages of one pipeline.

    Args:
      stages: what each is told (`jaxinfer.parallel.worker.make_stage`).
      launcher: where they are started.
      delay: of the links between stages.
      start_s: seconds in which a stage must have loaded its layers.
      silence_s: seconds after which a stage that answers no ping counts as lost.
      most_repairs: losses in a row, without a message in between, after which it gives up.
    """

    def __init__(
        self,
        stages: Sequence[Json],
        *,
        launcher: Launcher | None = None,
        delay: Delay | None = None,
        start_s: float = 300.0,
        silence_s: float = 30.0,
        most_repairs: int = 8,
    ):
        self.stages, self._launcher = list(stages), launcher or LocalLauncher()
        self._delay, self._start_s, self._silence_s = delay or Delay(), start_s, silence_s
        self._most_repairs = most_repairs
        self._secret = secrets.token_hex(32)
        self._changed = threading.Condition()
        self._members: dict[int, _Member] = {}
        self._front: TcpConnection | None = None
        self._inbox: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._back = -1  # the incarnation whose last stage has connected
        self._lost, self._closed, self._failures = "", False, 0
        self.incarnation, self.repairs = 1, 0
        self._listener = Listener(self._secret, self._taken, delay=self._delay)
        try:
            self._start(range(len(self.stages)))
            self._wire()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="jaxinfer-heartbeat", daemon=True).start()

    @property
    def processes(self) -> list[Process]:
        """Of the stages, in order."""
        return [self._members[i].process for i in range(len(self.stages))]

    @property
    def weights(self) -> str:
        """What tells the weights of all stages from others."""
        return " ".join(self._members[i].weights for i in range(len(self.stages)))

    def send(self, message: Message) -> None:
        """Hands a message to the first stage.

        Raises:
          StageLost: it could not.
        """
        self._check()
        assert self._front is not None
        try:
            self._front.send(message)
        except Closed as error:
            raise StageLost(f"the first stage is gone: {error}") from error

    def receive(self) -> Message:
        """The next message of the last stage.

        Raises:
          StageLost: none will come.
        """
        while True:
            self._check()
            try:
                incarnation, message = self._inbox.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if incarnation != self.incarnation:
                continue
            if message.what == "refused":
                raise StageLost(f"a stage refused a message: {message.fields.get('why')}")
            self._failures = 0
            return message

    def repair(self) -> None:
        """Starts the stages that are gone and wires all anew; their caches are empty then.

        Raises:
          RuntimeError: it cannot be repaired.
        """
        why = self._lost
        while True:
            self._failures += 1
            if self._failures > self._most_repairs:
                self._failures = 0  # whoever asks next may try again
                raise RuntimeError(
                    f"the pipeline was lost {self._most_repairs} times in a row, last as {why}"
                )
            with self._changed:  # from here on nobody's word on the old ring counts
                self.incarnation, self._lost = self.incarnation + 1, ""
            self.repairs += 1
            try:
                self._start([i for i, one in self._members.items() if not one.process.alive])
                self._wire()
                return
            except StageLost as error:
                why = str(error)

    def forget(self) -> None:
        """Wires the stages anew, with empty caches."""
        with self._changed:
            self.incarnation += 1
        with contextlib.suppress(StageLost):  # whoever sends next will repair it
            self._wire()

    def close(self) -> None:
        """Ends all stages."""
        self._closed = True
        self._listener.close()
        if self._front is not None:
            self._front.close()
        for member in self._members.values():
            member.process.kill()
            if member.control is not None:
                member.control.close()

    def _start(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            own = {
                "number": number, "controller": list(self._listener.address),
                "secret": self._secret, "delay": _finite(self._delay),
            }  # fmt: skip
            process = self._launcher.start(self.stages[number] | own)
            with self._changed:
                self._members[number] = _Member(process)
        self._wait("loaded its layers", lambda one: one.port is not None)

    def _wire(self) -> None:
        """Every stage connects to the one behind it, the last one to this process."""
        if self._front is not None:
            self._front.close()
        mine, count = self.incarnation, len(self.stages)
        for number in reversed(range(count)):
            member = self._members[number]
            behind = self._members[number + 1].port if number + 1 < count else None
            host, port = self._listener.address if behind is None else ("127.0.0.1", behind)
            try:
                assert member.control is not None
                member.control.send(Message("ring", {"incarnation": mine, "next": [host, port]}))
            except Closed as error:
                raise StageLost(f"stage {number} is gone: {error}") from error
        self._wait("joined the ring", lambda one: one.ready == mine)
        try:
            address = "127.0.0.1", self._members[0].port or 0
            self._front = connect(
                address, self._secret, delay=self._delay, role="data", incarnation=mine
            )
        except Closed as error:
            raise StageLost(f"the first stage is gone: {error}") from error

    def _wait(self, what: str, done: Callable[[_Member], bool]) -> None:
        """Until all members have done something; `StageLost` if one never will."""
        end = time.monotonic() + self._start_s
        with self._changed:
            while not all(map(done, self._members.values())):
                for number, one in self._members.items():
                    if not one.process.alive:
                        self._changed.wait_for(lambda one=one: one.error, LAST_WORD_S)
                        if one.error is None:
                            raise StageLost(f"stage {number} ended before it had {what}")
                    if one.error is not None:
                        raise ValueError(f"stage {number} cannot serve: {one.error}")
                if self._lost:
                    raise StageLost(self._lost)
                if time.monotonic() > end:
                    raise RuntimeError(f"no stage in {self._start_s:g} seconds had {what}")
                self._changed.wait(POLL_S)

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("this pipeline is closed")
        for number, one in self._members.items():
            if not one.process.alive:
                self._lost = f"stage {number} is gone"
        if self._lost:
            raise StageLost(self._lost)

    def _taken(self, connection: TcpConnection, who: Json) -> None:
        """Hears a stage's control connection, or the results of the last one."""
        number, incarnation = who.get("number"), who.get("incarnation")
        if who.get("role") == "stage" and isinstance(number, int) and number in self._members:
            self._hear(connection, self._members[number])
        elif who.get("role") == "data" and isinstance(incarnation, int):
            with contextlib.suppress(Closed):
                while True:
                    self._inbox.put((incarnation, connection.receive()))
            self._lose(incarnation, "the last stage is gone")

    def _hear(self, connection: TcpConnection, member: _Member) -> None:
        member.control = connection
        with contextlib.suppress(Closed):
            while True:
                message = connection.receive()
                with self._changed:
                    member.heard = time.monotonic()
                    fields = message.fields
                    if message.what == "loaded":
                        member.port, member.weights = fields["port"], fields["weights"]
                    elif message.what == "ready":
                        member.ready = fields["incarnation"]
                    elif message.what == "failed":
                        member.error = fields["error"]
                    elif message.what == "lost":
                        self._lose(fields["incarnation"], "a stage has lost its neighbour")
                    self._changed.notify_all()

    def _lose(self, incarnation: int, why: str) -> None:
        with self._changed:
            if incarnation == self.incarnation and not self._lost:
                self._lost = why
            self._changed.notify_all()

    def _watch(self) -> None:
        """Pings all stages; one that is silent for too long is ended, lest it answers late."""
        while not self._closed:
            time.sleep(1.0)
            for member in list(self._members.values()):
                if member.control is None or not member.process.alive:
                    continue
                with contextlib.suppress(Closed):
                    member.control.send(Message("ping", {}))
                if time.monotonic() - member.heard > self._silence_s:
                    member.process.kill()


def _finite(delay: Delay) -> Json:
    """A delay as JSON, which has no infinite numbers."""
    return {name: value for name, value in asdict(delay).items() if value != float("inf")}
