"""Processes of stages on this machine. Each has devices of its own and ends with its parent."""

import json
import os
import subprocess
import sys
from typing import Protocol, runtime_checkable

from jaxinfer.typing import Json

DEVICES_FLAG = "--xla_force_host_platform_device_count"


@runtime_checkable
class Process(Protocol):
    """A stage that was started."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        ...

    def kill(self) -> None:
        """Ends it at once, and waits until it is gone."""
        ...


@runtime_checkable
class Launcher(Protocol):
    """Where stages are started."""

    def start(self, given: Json) -> Process:
        """Starts `jaxinfer.parallel.worker` with what it is told."""
        ...


class LocalProcess:
    """A child of this process, whose standard input stays open as long as this one lives."""

    def __init__(self, child: "subprocess.Popen[bytes]"):
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        if self._child.stdin is not None:
            self._child.stdin.close()


class LocalLauncher:
    """Starts stages on this machine; a stage of several devices has virtual ones on a CPU."""

    def start(self, given: Json) -> LocalProcess:
        environment = dict(os.environ)
        flags = environment.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if not flag.startswith(DEVICES_FLAG)]
        environment["XLA_FLAGS"] = " ".join([*flags, f"{DEVICES_FLAG}={given['degree']}"])
        child = subprocess.Popen(
            [sys.executable, "-m", "jaxinfer.parallel.worker"],
            stdin=subprocess.PIPE, env=environment,
        )  # fmt: skip
        assert child.stdin is not None
        child.stdin.write(json.dumps(given).encode() + b"\n")
        child.stdin.flush()
        return LocalProcess(child)
