"""How DejaVu's predictors are trained, and how many units their layers then take."""

from dataclasses import dataclass

from jaxinfer.config import ModelConfig
from jaxinfer.sparsity.base import check_lookahead
from jaxinfer.sparsity.predictors import rank_of

SHARE = 0.3  # of the units that a token needs, where neither zeros nor a density say how many


@dataclass(frozen=True, kw_only=True)
class DejavuRecipe:
    """Loss, optimiser and split are those of the paper's code (`jaxinfer.train.dejavu.objective`).

    `lookahead` None reads the token's embedding: the non-contextual baseline. A unit has
    `block_size` neurons. With `density` every layer takes that share of its units, else as many as
    reach `recall` on the texts held out, at most the share `most`. `heads` is the share of the
    groups of heads that a layer takes; None leaves attention dense. `rank` None: a sixteenth of the
    width (`jaxinfer.sparsity.predictors.rank_of`).

    Raises:
      ValueError: naming the value that is out of range.
    """

    lookahead: float | None = 0.0
    block_size: int = 1
    density: float | None = None
    recall: float = 0.99
    most: float = 1.0
    heads: float | None = None
    rank: int | None = None
    steps: int = 1500
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    validation: float = 0.05
    evaluations: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.lookahead is not None:
            check_lookahead(self.lookahead)
        for name in ("density", "recall", "most", "heads"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {value:g}")
        for name in ("block_size", "rank", "steps", "batch", "evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie in (0, 1), got {self.validation:g}")

    def check(self, cfg: ModelConfig) -> None:
        """Raises ValueError where the model has no such units."""
        neurons = cfg.intermediate_size
        if neurons % self.block_size:
            raise ValueError(
                f"blocks of {self.block_size} neurons do not divide the {neurons} of a layer"
            )
        if self.heads is not None and cfg.num_kv_heads == 1:
            raise ValueError(
                "all query heads of this model share one key head, so that there are no groups to "
                "choose from; leave heads out"
            )
        ahead = self.lookahead or 0.0
        if cfg.num_layers == 1 and ahead > (0.5 if self.heads is None else 0.0):
            raise ValueError(
                f"look-ahead {ahead:g} leaves the only layer dense; choose a smaller one"
            )

    @property
    def share(self) -> float:
        """The share of the units that a token needs, where activations do not say."""
        return SHARE if self.density is None else self.density

    def rank_for(self, cfg: ModelConfig) -> int:
        return self.rank or rank_of(cfg.hidden_size)
