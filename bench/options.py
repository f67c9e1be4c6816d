"""What a user asks for: the options that all routines share, and presets of their sizes.

A preset is a TOML file in `bench/presets` with one table per routine; `standard` is what is
reported, `quick` tries everything out in seconds and says nothing about speed.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import RESULTS

PRESETS = Path(__file__).parent / "presets"


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one run. `say` receives progress lines."""

    model: str = "smollm2-135m"
    preset: str = "standard"
    gguf: str | None = None
    sparsity: str | None = None
    weights: str | None = None
    rounds: int | None = None
    torch: bool = True
    seed: int = 0
    results: Path = RESULTS
    say: Callable[[str], None] = _silent

    def __post_init__(self):
        if self.gguf is not None and not Path(self.gguf).expanduser().is_file():
            raise ValueError(
                f"--gguf {self.gguf} is not a file; give a GGUF file or a wheel with one"
            )
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {self.rounds}")

    def settings(self, routine: str) -> dict[str, Any]:
        """The preset's table of a routine; `rounds` replaces every number of rounds in it."""
        table = dict(load_preset(self.preset)[routine])
        if self.rounds is not None:
            old = table["rounds"]
            table["rounds"] = [self.rounds] * len(old) if isinstance(old, list) else self.rounds
        return table

    def config(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A record's config: model, preset and sizes. Paths shrink to their names."""
        return {"model": Path(self.model).name, "preset": self.preset} | settings

    def command(self, routine: str) -> str:
        """The command that repeats this run, without paths of this machine."""
        words = ["python -m bench", routine, "--model", Path(self.model).name]
        if self.preset != "standard":
            words += ["--preset", self.preset]
        if self.gguf is not None:
            words += ["--gguf", Path(self.gguf).name]
        if self.sparsity is not None:
            words += ["--sparsity", Path(self.sparsity).name]
        if self.weights is not None:
            words += ["--weights", self.weights]
        if self.rounds is not None:
            words += ["--rounds", str(self.rounds)]
        if not self.torch:
            words += ["--no-torch"]
        return " ".join([*words, "--seed", str(self.seed)])


def load_preset(name: str) -> dict[str, Any]:
    path = PRESETS / f"{name}.toml"
    if Path(name).name != name or not path.is_file():
        known = sorted(found.stem for found in PRESETS.glob("*.toml"))
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(known)}")
    return tomllib.loads(path.read_text(encoding="utf-8"))
