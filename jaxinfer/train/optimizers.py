"""The optimisers of the training scripts: AdamW or Muon with clipping, warm-up and a cosine decay.

Weight decay (arXiv 1711.05101) touches matrices only; norms, biases and every other vector are left
alone. Muon (arXiv 2502.16982) needs fewer steps on a small budget of tokens; it is for models whose
matrices are [in, out] kernels. Anything else is an ordinary Optax transform for `loop.fit`.
"""

import jax
import optax

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


def decayed(params: Params) -> Params:
    """True for the leaves that weight decay applies to: those with two or more axes."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


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
    """Muon for the kernels of a model, Adam for embeddings, heads and vectors, both at one rate.

    Updates are scaled to the size that AdamW's have, so AdamW's learning rates and decay apply.
    """
    from optax import contrib

    def dimensions(params: Params) -> Params:
        def of(path, leaf):
            names = {getattr(entry, "key", None) for entry in path}
            is_kernel = leaf.ndim == 2 and not names & {"embed", "head"}
            return contrib.MuonDimensionNumbers() if is_kernel else None

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
