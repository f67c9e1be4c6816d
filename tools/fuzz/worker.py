"""One process of the fuzzer: draws its inputs, reads them under limits, and reports what is wrong.

The number of the input that is being read stands in shared memory, so that the parent knows which
one ended the process.
"""

import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tools.fuzz.limits import MOST_BYTES, limit_memory, limited_time, peak_bytes
from tools.fuzz.target import Files, Target, outcome, read_files


class Input(NamedTuple):
    """What names an input."""

    target: str
    number: int


class Finding(NamedTuple):
    """An input with what is wrong, and the damaged file."""

    input: Input
    error: str
    file: str
    content: bytes


def rng_of(seed: int, one: Input) -> random.Random:
    """The randomness of an input, which depends on nothing else."""
    return random.Random(f"{seed}/{one.target}/{one.number}")


class Bench:
    """The good examples of some targets, in folders of their own."""

    def __init__(self, folder: Path, targets: Sequence[Target]):
        self.targets = {target.name: target for target in targets}
        self.folders: dict[str, Path] = {}
        self.good: dict[str, Files] = {}
        for target in targets:
            self.folders[target.name] = place = folder / target.name
            place.mkdir()
            target.make(place)
            self.good[target.name] = read_files(place)
            wrong = outcome(target, place)
            if wrong is not None:
                raise RuntimeError(f"the good example of {target.name} is refused: {wrong}")

    def draw(self, seed: int, one: Input) -> tuple[str, bytes]:
        """The damaged file of an input."""
        return self.targets[one.target].draw(rng_of(seed, one), self.good[one.target])

    def try_out(self, name: str, file: str, content: bytes) -> str | None:
        """What is wrong with how the target `name` reads its example with that file."""
        folder, good = self.folders[name], self.good[name]
        (folder / file).write_bytes(content)
        try:
            with limited_time():
                return outcome(self.targets[name], folder)
        finally:
            if file in good:
                (folder / file).write_bytes(good[file])
            else:
                (folder / file).unlink()


def work(
    targets: Sequence[Target],
    plan: Sequence[Input],
    seed: int,
    place: Any,
    since: Any,
    out: Connection,
) -> None:
    """Reads the inputs `plan[place.value:]`; sends findings, then None."""
    logging.disable(logging.WARNING)  # what jax says of hardware that is not there
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="jaxinfer-fuzz-") as folder:
        os.environ["JAXINFER_CACHE"] = f"{folder}/cache"
        bench = Bench(Path(folder), targets)
        limit_memory()
        while place.value < len(plan):
            one = plan[place.value]
            file, content = bench.draw(seed, one)
            since.value = time.monotonic()
            wrong = bench.try_out(one.target, file, content)
            since.value = 0.0
            too_large = peak_bytes() > MOST_BYTES
            if too_large:
                wrong = wrong or f"it took {peak_bytes() / 2**30:.1f} GiB"
            if wrong is not None:
                out.send(Finding(one, wrong, file, content))
            place.value += 1
            if too_large:
                return  # a new process, whose peak is small again
        out.send(None)
