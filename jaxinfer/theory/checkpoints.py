"""The checkpoints of a training, measured one after the other: how attention, ranks and activity
moved, and whether they dropped and came back (arXiv 2310.00535, section 5).

    options.json      text and windows that the run was started with
    measures/N.npz    what step N's checkpoint measures, with a stamp of its files

One checkpoint is in memory at a time. A run that was killed goes on with the next one, and one
whose training has since made more checkpoints measures those. Axis letters: C checkpoints.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.files import one_line, quoted, read_json
from jaxinfer.io.checkpoint import checkpoint_config, is_checkpoint, load_checkpoint_folder
from jaxinfer.io.tokenizer import Tokenizer, has_tokenizer
from jaxinfer.progress import Report, silent
from jaxinfer.theory.measures.model import Measures, measure_model
from jaxinfer.theory.windows import spread_windows
from jaxinfer.train.run_folder import check_options, read_arrays, write_arrays
from jaxinfer.typing import Params

NUMBER = re.compile(r"(\d+)\D*$")


class Snapshot(NamedTuple):
    """A checkpoint on the way."""

    step: int
    folder: Path


class Rebound(NamedTuple):
    """How a number fell from its first value and rose again."""

    first: float
    lowest: float
    step: int  # of the lowest
    last: float
    rebound: float  # (last - lowest) / (first - lowest), of a number that fell; else NaN


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Measures of every checkpoint by name, f32[C, L, N] or f32[C, L], and the steps i64[C]."""

    steps: Int[np.ndarray, " C"]
    measures: Measures

    def by_layer(self, name: str) -> Float[np.ndarray, "C L"]:
        """A measure, the mean over heads where it is one of heads."""
        found = self.measures[name]
        return found if found.ndim == 2 else found.mean(axis=2)

    def rebounds(self, name: str) -> list[Rebound]:
        """Drop and rebound of a measure, layer by layer."""
        return [drop_and_rebound(self.steps, line) for line in self.by_layer(name).T]


@dataclass(frozen=True)
class _Model:
    config: ModelConfig
    params: Params


def snapshots_in(folder: Path) -> list[Snapshot]:
    """The checkpoints of one training in the folders below `folder`, by step: the one that a
    checkpoint's record has, or the last number of the folder's name.

    Raises:
      ValueError: there are fewer than two, two of one step, or they are not of one model.
    """
    if not folder.is_dir():
        raise ValueError(f"{quoted(folder)} is no folder; give the one that holds the checkpoints")
    found = [
        Snapshot(_step(path), path) for path in sorted(folder.iterdir()) if is_checkpoint(path)
    ]
    if len(found) < 2:
        raise ValueError(
            f"{quoted(folder)} holds {len(found) or 'no'} checkpoint{'s' * (len(found) != 1)} in "
            "the folders below it; give the folder that holds those of a training, two at least "
            "(tools/data/train_tiny.py --snapshots makes them)"
        )
    found.sort()
    for one, other in zip(found, found[1:], strict=False):
        if one.step == other.step:
            names = f"{quoted(one.folder.name)} and {quoted(other.folder.name)}"
            raise ValueError(f"{names} are both of step {one.step}; keep one of them")
    _check_alike(found)
    return found


def measure_checkpoints(
    snapshots: Sequence[Snapshot],
    text: str,
    run: Path,
    *,
    window: int = 256,
    windows: int = 8,
    block: int = 128,
    report: Report = silent,
) -> Dynamics:
    """Measures of each checkpoint (`jaxinfer.theory.measures.model.measure_model`) on a text.

    Args:
      snapshots: of `snapshots_in`.
      text: what the models read.
      run: working folder; what is measured there already is taken from it.
      window: tokens of a window; each is a text of its own.
      windows: how many of the text's windows are read, spread over it; all that there are, at most.
      block: queries whose attention exists at a time.
      report: draws progress.

    Raises:
      ValueError: the text is shorter than a window, a checkpoint is damaged, or the run was started
        with another text or other windows.
    """
    tokens = _windows(snapshots[0].folder, text, window, windows)
    run = Path(run)
    (run / "measures").mkdir(parents=True, exist_ok=True)
    check_options(run, {"tokens": list(tokens.shape), "crc32": zlib.crc32(tokens.tobytes())})
    found: list[Measures] = []
    for done, one in enumerate(snapshots):
        report("checkpoints", done, len(snapshots))
        within: Callable[[int, int], None] = lambda layers, of: report("layers", layers, of)  # noqa: E731
        found.append(_measured(one, tokens, run / "measures" / f"{one.step}.npz", block, within))
    report("checkpoints", len(snapshots), len(snapshots))
    return Dynamics(
        steps=np.asarray([one.step for one in snapshots], np.int64),
        measures={name: np.stack([one[name] for one in found]) for name in found[0]},
    )


def drop_and_rebound(steps: Int[np.ndarray, " C"], values: Float[np.ndarray, " C"]) -> Rebound:
    """Where a number was lowest, and which part of its fall it made good.

    Example:
      >>> import numpy as np
      >>> drop_and_rebound(np.array([0, 10, 20]), np.array([4.0, 1.0, 2.5])).rebound
      0.5
    """
    at = 0 if np.isnan(values).all() else int(np.nanargmin(values))
    first, lowest, last = float(values[0]), float(values[at]), float(values[-1])
    share = (last - lowest) / (first - lowest) if first > lowest else np.nan
    return Rebound(first, lowest, int(steps[at]), last, share)


def _measured(
    one: Snapshot, tokens: np.ndarray, path: Path, block: int, report: Callable[[int, int], None]
) -> Measures:
    """What a checkpoint measures, from the file of an earlier run if its files are the same."""
    stamp = _stamp(one.folder)
    if path.is_file():
        kept = read_arrays(path)
        if kept.pop("stamp", None) == stamp:
            return kept
    try:
        checkpoint = load_checkpoint_folder(one.folder, "float32")
        model = _Model(checkpoint.config, checkpoint.params)
        found = measure_model(model, tokens, block=block, report=report)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"checkpoint {quoted(one.folder.name)}: {one_line(error)}; put a whole one there or "
            "take it away, and the run goes on"
        ) from error
    write_arrays(path, found | {"stamp": np.asarray(stamp)})
    return found


def _stamp(folder: Path) -> int:
    """Another number when a file of the folder is."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return zlib.crc32(repr([(name, x.st_size, x.st_mtime_ns) for name, x in stats]).encode())


def _step(folder: Path) -> int:
    path = folder / "provenance.json"
    try:
        step = read_json(path).get("step") if path.is_file() else None
    except ValueError:
        step = None
    if isinstance(step, int) and not isinstance(step, bool):
        return step
    number = NUMBER.search(folder.name)
    if number is None:
        raise ValueError(
            f"checkpoint {quoted(folder.name)} does not say its step; name it after it, "
            "such as step-000040"
        )
    return int(number[1])


def _check_alike(snapshots: Sequence[Snapshot]) -> None:
    first = snapshots[0].folder
    expected, words = checkpoint_config(first).to_dict(), _words(first)
    for _, folder in snapshots[1:]:
        found = checkpoint_config(folder).to_dict()
        other = [name for name in expected | found if expected.get(name) != found.get(name)]
        other += ["tokenizer"] * (_words(folder) != words)
        if other:
            raise ValueError(
                f"checkpoints {quoted(first.name)} and {quoted(folder.name)} are of different "
                f"models, with another {', '.join(other)}; give those of one training"
            )


def _words(folder: Path) -> int:
    path = folder / "tokenizer.json"
    return zlib.crc32(path.read_bytes()) if path.is_file() else 0


def _windows(folder: Path, text: str, window: int, windows: int) -> Int[np.ndarray, "Q T"]:
    if not has_tokenizer(folder):
        raise ValueError(
            f"checkpoint {quoted(folder.name)} has no tokenizer to read the text with; put the "
            "model's tokenizer.json there"
        )
    return spread_windows(Tokenizer.load(folder).encode(text), window, windows)
