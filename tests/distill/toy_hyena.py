"""A toy model with a long filter of every kind: sums of modes, attention, delays, and noise."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.hyena_config import FilterConfig, HyenaConfig
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from tests.distill.filter_banks import sums_of_modes
from tests.factories import BASE

LAGS, MODES, SIZE = 96, 3, 4
DELAYED, NOISY = 2, 3  # layers whose filters are short delays, and white noise
CFG = replace(
    BASE,
    num_layers=4,
    max_positions=LAGS,
    mixers=("hyena", "attn", "hyena", "hyena"),
    hyena=HyenaConfig(head_size=SIZE, filter=FilterConfig(kind="explicit")),
)


def filters() -> dict[int, np.ndarray]:
    """Of each layer with long filters, [F, L] with F = 32 / 4."""
    count, random = CFG.hidden_size // SIZE, np.random.default_rng(0)
    delays = np.zeros((count, LAGS))
    delays[np.arange(count), 1 + np.arange(count) % 3] = 1.0
    return {
        0: 0.3 * sums_of_modes(count, MODES, LAGS, least=0.7, most=0.95)[2],
        DELAYED: delays,
        NOISY: 0.1 * random.normal(size=(count, LAGS)),
    }


@functools.cache
def toy_lm() -> LM:
    """The model, loud enough that filters matter to its text."""
    params = init_params(CFG, jax.random.key(0))
    params = jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, params)
    layers = list(params["layers"])
    for index, h in filters().items():
        own = layers[index]["hyena"] | {"filter": {"h": jnp.asarray(h, jnp.float32)}}
        layers[index] = layers[index] | {"hyena": own}
    return LM(CFG, params | {"layers": tuple(layers)}, name="toy-hyena")
