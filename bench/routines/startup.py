"""Start-up: a new process up to its first token, and what `import jaxinfer` costs beyond jax.

The first process finds an empty compilation cache ("cold"), the following ones the cache that it
left and the converted checkpoint ("warm"). Wall time from spawning the process to the line that
holds its first token. Imports are timed as whole processes, alternating with `import jax`.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import peers
from bench.harness import interleave, summarise, timed
from bench.options import Options
from bench.worker import PeerError, environment

CHILD = """
import json, sys, time
start = time.perf_counter()
from jaxinfer.runtime.compilation_cache import enable_persistent_cache
from jaxinfer.loading import load
imported = time.perf_counter()
folder, cache, length, new = sys.argv[1:]
enable_persistent_cache(cache)
lm = load(folder, dtype="float32")
loaded = time.perf_counter()
pieces = {"import_s": imported - start, "load_s": loaded - imported}
if lm.tokenizer is None:
    lm.generate([list(range(3, 3 + int(length)))], max_new_tokens=1)
else:
    text = lm.stream(" word" * int(length), max_new_tokens=int(new), ignore_eos=True)
    next(piece for piece in text)
pieces["first_token_s"] = time.perf_counter() - loaded
print(json.dumps(pieces), flush=True)
"""


def run(options: Options) -> list[tuple[dict, dict]]:
    sizes = options.settings("startup")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        with peers.Peers(options) as started:
            ours, facts = started.jaxinfer()
            ours.call("save", folder=str(folder / "model"))
        arguments = [str(folder / "model"), str(folder / "xla")]
        arguments += [str(sizes["prompt"]), str(sizes["new"])]

        def start() -> dict[str, Any]:
            return first_token([sys.executable, "-P", "-c", CHILD, *arguments])

        options.say("cold start")
        cold = start()
        warm = []
        for index in range(sizes["rounds"]):
            options.say(f"warm start {index + 1}/{sizes['rounds']}")
            warm.append(start())
    imports = interleave(
        {name: lambda name=name: import_time(name) for name in ("jax", "jaxinfer")},
        sizes["rounds"],
        options.say,
    )
    pairs = zip(
        imports["jaxinfer"].values("seconds"), imports["jax"].values("seconds"), strict=True
    )
    metrics = {
        "cold": cold,
        "warm": {key: summarise([one[key] for one in warm]) for key in warm[0]},
        "import_jax_s": summarise(imports["jax"].values("seconds")),
        "import_beyond_jax_s": summarise([both - alone for both, alone in pairs]),
        "device": facts["device"],
        "missing": {},
    }
    return [(options.config(sizes), metrics)]


def first_token(command: list[str]) -> dict[str, Any]:
    """Seconds from the spawn to the child's line, and the parts that the child reports."""
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment()) as child,
    ):
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - start
        code = child.wait()
        log.seek(0)
        last = log.read().decode(errors="replace").strip().splitlines()[-1:]
    if not line or code:
        raise PeerError(f"the start-up process ended with {code}: {' '.join(last)}")
    return {"seconds": seconds} | json.loads(line)


def import_time(module: str) -> dict[str, float]:
    command = [sys.executable, "-P", "-c", f"import {module}"]
    return {
        "seconds": timed(lambda: subprocess.run(command, check=True, env=environment()) and None)[0]
    }
