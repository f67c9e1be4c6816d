"""Servers with the OpenAI API, each in its own process on a free port of this machine.

A server is ready when it has answered a short completion. One that cannot run here is left out with
the reason, like other peers.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from bench.worker import PeerError, environment

START_S = 300.0


@dataclass(frozen=True)
class ServerProcess:
    """A running server: where it is, and what a body needs to be answered like others'."""

    name: str
    url: str
    body: Mapping[str, Any]
    process: subprocess.Popen


@contextlib.contextmanager
def server(
    name: str, command: Sequence[str], port: int, body: Mapping[str, Any]
) -> Iterator[ServerProcess]:
    """A server that is ready; its process is ended behind the block.

    Raises:
      PeerError: it ended, or was not ready in time.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment()
        )
        try:
            url = f"http://127.0.0.1:{port}/v1"
            _wait(name, process, url, body, log)
            yield ServerProcess(name, url, body, process)
        finally:
            end(process)


def _wait(name: str, process: subprocess.Popen, url: str, body: Mapping[str, Any], log) -> None:
    stop = time.monotonic() + START_S
    trial = {key: value for key, value in body.items() if key != "stream_options"}
    trial |= {"prompt": "Once", "max_tokens": 2}
    while process.poll() is None and time.monotonic() < stop:
        with contextlib.suppress(httpx.TransportError):
            found = httpx.post(f"{url}/completions", json=trial, timeout=START_S)
            if found.status_code == 200:
                return
            if 400 <= found.status_code < 500 and found.status_code != 429:
                raise PeerError(f"{name}: {found.status_code}: {found.text[:300]}")
        time.sleep(0.2)
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
    ended = "" if process.poll() is None else f" with {process.returncode}"
    raise PeerError(f"{name}: the server was not ready or ended{ended}: {lines[-1]}")


def end(process: subprocess.Popen, seconds: float = 20.0) -> int:
    """Asks a process to end, kills it if it does not, and returns its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    return process.returncode


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def jaxinfer(
    model: str, *options: str, name: str = "jaxinfer", tokens: int = 64
) -> contextlib.AbstractContextManager[ServerProcess]:
    """Ours. `options` are those of `jaxinfer serve`."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "jaxinfer", "serve", model, "--port", str(port)]
    body = _body(tokens) | {"ignore_eos": True, "stream_options": {"include_usage": True}}
    return server(name, [*command, *options], port, body)


def transformers(folder: str, tokens: int) -> contextlib.AbstractContextManager[ServerProcess]:
    """`transformers serve` with continuous batching, on torch.

    Raises:
      PeerError: it is not installed.
    """
    for package in ("torch", "transformers", "fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise PeerError(f"transformers: {package} not installed")
    port = free_port()
    command = [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve", folder]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command += ["--continuous-batching"]
    return server("transformers", command, port, _body(tokens) | {"model": folder})


def llama_cpp(
    gguf: str, tokens: int, *, slots: int, context: int, threads: int
) -> contextlib.AbstractContextManager[ServerProcess]:
    """llama.cpp's own server, from the wheel `xllamacpp`.

    Raises:
      PeerError: it is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise PeerError("llama.cpp: xllamacpp not installed")
    port = free_port()
    sizes = [str(x) for x in (port, slots, context, threads)]
    command = [sys.executable, "-P", "-m", "bench.peers.llama_server", gguf, *sizes]
    return server("llama.cpp", command, port, _body(tokens) | {"ignore_eos": True})


def _body(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "temperature": 0}


def memory(process: subprocess.Popen) -> int:
    """Resident bytes of a process (Linux)."""
    with open(f"/proc/{process.pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
