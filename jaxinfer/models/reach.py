"""How long a text a model can read."""

from jaxinfer.config import ModelConfig
from jaxinfer.models.mixers import mixers_of


def check_positions(cfg: ModelConfig, length: int) -> None:
    """Refuses a text longer than learned positions or long filters reach."""
    most = reach(cfg)
    if most is not None and length > most:
        what = "learned positions" if cfg.positions == "learned" else "lags of the filters"
        raise ValueError(f"{length} tokens exceed the {most} {what} of the model; shorten the text")


def reach(cfg: ModelConfig) -> int | None:
    """The longest text that the model can read, as learned positions and long filters end; None
    without such a limit."""
    limits = [mixer.reach(cfg, layer) for layer, mixer in enumerate(mixers_of(cfg))]
    limits += [cfg.max_positions if cfg.positions == "learned" else None]
    return min((limit for limit in limits if limit is not None), default=None)
