"""A model of long convolutions in the shape of a transformer, with random weights.

Time and memory do not depend on what filters are: an explicit filter per channel, and K random
modes beside it, by which the same model decodes as a recurrence.
"""

from dataclasses import replace
from typing import Any

import numpy as np


def hyena_like(lm: Any, positions: int, modes: int, head_size: int = 1, seed: int = 0) -> Any:
    """An `LM` of Hyena layers as wide and deep as `lm`, with its vocabulary."""
    import jax

    from jaxinfer.hyena_config import FilterConfig, HyenaConfig
    from jaxinfer.lm import LM
    from jaxinfer.models.filter_form import distilled
    from jaxinfer.models.params import init_params

    config = replace(
        lm.config, family="hyena", max_positions=positions, positions="none", rope=None,
        alibi_slopes=None, sliding_windows=None, mixers=("hyena",) * lm.config.num_layers,
        hyena=HyenaConfig(head_size=head_size, filter=FilterConfig(kind="explicit")),
    )  # fmt: skip
    params = init_params(config, jax.random.key(seed))
    count, rng = config.hyena.filters(config.hidden_size), np.random.default_rng(seed)
    made = [random_modes(count, modes, rng) for _ in range(config.num_layers)]
    return LM(*distilled(config, params, made), name=f"hyena like {lm.name}")


def random_modes(filters: int, modes: int, rng: np.random.Generator) -> Any:
    """A `ModalFilter` whose modes fade within some tens to hundreds of tokens."""
    from jaxinfer.nn.modal import modal_filter

    shape = (filters, modes)
    poles = rng.uniform(0.9, 0.99, shape) * np.exp(1j * rng.uniform(-np.pi, np.pi, shape))
    residues = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / modes
    return modal_filter(poles, 0.1 * residues, rng.normal(size=filters))
