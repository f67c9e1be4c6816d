"""How a draft is trained."""

from dataclasses import dataclass

from jaxinfer.train import optimizers

OPTIMIZERS = {"muon": optimizers.muon, "adamw": optimizers.adamw}


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """`width` None takes the target's first layers and its last, or for a `recurrent` draft a cell
    of `layers` blocks; else a Llama of that width.

    `vocabulary`: tokens that a draft with the target's head can propose. `own`: share of the
    windows that the target wrote itself. A step of Muon costs much where weights are large and
    batches small, one of AdamW does not.
    """

    recurrent: bool = False
    layers: int = 2
    width: int | None = 96
    vocabulary: int = 8192
    windows: int = 2048
    context: int = 256
    own: float = 0.5
    steps: int = 2000
    batch: int = 8
    learning_rate: float = 3e-3
    optimizer: str = "muon"
    seed: int = 0

    def __post_init__(self):
        if self.recurrent and self.width is not None:
            raise ValueError(
                f"a recurrent draft has the target's width, got width={self.width}; leave it out"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
