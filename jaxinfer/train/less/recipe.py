"""How LESS's feature maps are trained."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LessRecipe:
    """How feature maps are trained: as in the paper, but smaller and faster, and so without its
    dropout of 0.3 and at three times its rate.

    `extra` is what Baseline+ keeps beside the policy: the state of R = 8 in float32 takes as much
    memory as 8 tokens in 16 bits. The learning rate halves after every quarter of the steps.
    """

    hidden: int = 64
    rank: int = 8
    steps: int = 800
    batch: int = 2
    stride: int = 16
    dropout: float = 0.0
    learning_rate: float = 3e-3
    validation: float = 0.125
    evaluations: int = 8
    extra: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.steps < 4 or self.batch < 1 or self.stride < 1:
            raise ValueError(f"a recipe needs steps >= 4, batch and stride >= 1, got {self}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
