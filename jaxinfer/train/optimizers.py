"""The optimisers of the training scripts: AdamW or Muon with clipping, and their schedules.

Weight decay (arXiv 1711.05101) touches matrices only; norms, biases and every other vector are left
alone. Muon (arXiv 2502.16982) needs fewer steps on a small budget of tokens; it is for models whose
matrices are [outputs, inputs] weights. Anything else is an ordinary Optax transform for `loop.fit`.
"""

from typing import Any

import jax
import optax

from jaxinfer.models.params import is_filter, leaf_name
from jaxinfer.typing import Params


def warmup_cosine(peak: float, steps: int, *, warmup: int, final: float = 0.1) -> optax.Schedule:
    """Learning rate: linear to `peak` over `warmup` steps, then a cosine to `final * peak`."""
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must lie in [0, steps), got warmup {warmup} with steps {steps}")
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=final * peak,
    )


def warmup_stable_decay(
    peak: float, steps: int, *, warmup: int, decay: float = 0.25
) -> optax.Schedule:
    """Learning rate: linear to `peak`, constant, then linear to 0 over the last `decay` of `steps`.

    Until the decay begins the rate does not depend on `steps`: a run can still change its length.
    """
    fall = round(decay * steps)
    if warmup < 0 or not 0 < fall <= steps - warmup:
        raise ValueError(
            f"warmup {warmup} and decay {decay} do not fit in {steps} steps; shorten one of them"
        )
    rise = optax.schedules.linear_schedule(0.0, peak, warmup)
    level = optax.schedules.constant_schedule(peak)
    descent = optax.schedules.linear_schedule(peak, 0.0, fall)
    parts = [rise, level, descent] if warmup else [level, level, descent]
    return optax.schedules.join_schedules(parts, [warmup, steps - fall])


def decayed(params: Params) -> Params:
    """True for the leaves that weight decay applies to: those with two or more axes, but for long
    filters, which would forget."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and not is_filter(leaf_name(path)), params
    )


def adamw(
    schedule: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
) -> optax.GradientTransformation:
    """AdamW with the gradient clipped to the global norm `clip` (None: not clipped)."""
    clipping = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
    return optax.chain(
        clipping, optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    )


def muon(
    schedule: optax.ScalarOrSchedule, *, weight_decay: float = 0.1, clip: float | None = 1.0
) -> optax.GradientTransformation:
    """Muon for the weights of a model, Adam for embeddings, heads and vectors, both at one rate.

    Updates are scaled to the size that AdamW's have, so AdamW's learning rates and decay apply.
    """
    from optax import contrib

    def dimensions(params: Any) -> Any:
        def of(path, leaf):
            names = {getattr(entry, "key", None) for entry in path}
            is_weight = leaf.ndim == 2 and not names & {"embed", "head"}
            is_weight = is_weight and not is_filter(leaf_name(path))
            return contrib.MuonDimensionNumbers(1, 0) if is_weight else None

        return jax.tree_util.tree_map_with_path(of, params)

    clipping = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
    orthogonal = contrib.muon(
        schedule,
        weight_decay=weight_decay,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(clipping, orthogonal)
