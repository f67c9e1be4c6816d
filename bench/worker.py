"""Long-lived processes that measure: one JSON request a line in, one JSON reply a line out.

Two libraries in one process share cores between two thread pools, and what is measured then is how
their threads wait for each other. So every peer has a process of its own; all but one of them are
blocked in a read at any time. `OMP_WAIT_POLICY=PASSIVE` keeps OpenMP's threads from spinning there.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class PeerError(RuntimeError):
    """A worker answered with an error, died, or took too long."""


class Worker:
    """A worker process; `call` asks it one thing and waits.

    Example:
      with Worker("torch", python("bench.peers.torch_peer")) as peer:
          peer.call("load", folder="checkpoint")
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
        )

    def call(self, method: str, timeout_s: float = 300.0, **arguments: Any) -> Any:
        """The reply of the worker's handler `method`; PeerError when it fails."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        try:
            stdin.write(json.dumps({"call": method, "arguments": arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            code = self._process.wait()
            raise PeerError(
                f"{self.name}: process ended with {code} during {method}{self._log_tail()}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self.name}: {reply['error']}")
        return reply["result"]

    def close(self) -> None:
        """Ends the process: end of input asks it to leave, a kill follows."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _log_tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def environment() -> dict[str, str]:
    """The variables of a measuring process: this checkout on the path, and no compilation cache
    that would hide what compiling costs."""
    kept = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    return kept | ENVIRONMENT | {"PYTHONPATH": path}


def python(module: str) -> list[str]:
    """The command of a worker that is a Python module, never one of the current folder."""
    return [sys.executable, "-P", "-m", module]


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answers requests until end of input. Whatever else prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": handlers[request["call"]](**request["arguments"])}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
