"""The baselines of sparsity by name, and as methods that `lm.sparsified` takes."""

from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType

import numpy as np

from jaxinfer.arguments import of_kind, one_of
from jaxinfer.config import ModelConfig
from jaxinfer.sparsity import baselines as b
from jaxinfer.sparsity.calibration import Calibration
from jaxinfer.sparsity.method import Sparsity
from jaxinfer.typing import Json, Params

Make = Callable[[Calibration, float, int], Params]
"""(calibrated model, density, neurons of a block) -> parameters."""

BASELINES: dict[str, Make] = {
    "oracle": b.oracle,
    "contribution-oracle": b.contribution_oracle,
    "random": b.random,
    "static": b.static,
    "cats": b.cats,
    "teal": b.teal,
    "wina": b.wina,
    "griffin": b.griffin,
    "moefication-oracle": b.moefication_oracle,
    "moefication": b.moefication_router,
}
BY_TEXT = ("static", "cats", "teal", "wina", "moefication")
"""Those that learn from the calibration text."""
BY_PROMPT = "griffin"
"""The one that reads texts whole."""


@dataclass(frozen=True, kw_only=True)
class Baseline(Sparsity):
    """A baseline as a method that `lm.sparsified` takes.

    Args:
      name: one of `BASELINES`.
      density: what a token uses, above 0 and at most 1.
      block_size: neurons of a block; cats, teal and wina choose singly all the same.
      calibration: the dense model and a text, to share what is measured between densities. Those
        not `BY_TEXT` need none.

    Example:
      >>> import jaxinfer as ji
      >>> lm = ji.load("tiny-llama")
      >>> sparse = lm.sparsified(Baseline(name="oracle", density=0.5, block_size=32))
      >>> sparse.sparsity.describe()
      {'name': 'oracle', 'density': 0.5, 'block_size': 32}
    """

    density: float
    block_size: int = 1
    calibration: Calibration | None = None

    def __post_init__(self):
        one_of("baseline", self.name, BASELINES)
        b.check_density(self.density)
        of_kind("calibration", self.calibration, (Calibration, NoneType), "a Calibration or None")
        if self.calibration is None and self.name in BY_TEXT:
            raise ValueError(
                f"{self.name} learns from a text: give calibration=Calibration(lm.config, "
                "lm.params, tokens)"
            )

    def apply(self, cfg: ModelConfig, params: Params) -> Params:
        calibration = self.calibration
        if calibration is None:
            calibration = Calibration(cfg, params, np.zeros((1, 1), np.int32))
        elif calibration.params is not params:
            calibration = Calibration(cfg, params, calibration.tokens)
        return BASELINES[self.name](calibration, self.density, self.block_size)

    def describe(self) -> Json:
        return {"name": self.name, "density": self.density, "block_size": self.block_size}
