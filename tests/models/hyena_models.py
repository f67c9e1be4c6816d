"""Small models with Hyena layers of every form beside attention."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.config import ModelConfig
from jaxinfer.hyena_config import FilterConfig, HyenaConfig
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.nn.modal import modal_filter
from jaxinfer.testing.quick import quick_jit
from jaxinfer.typing import Params
from tests.factories import BASE

FILTER = FilterConfig(features=5, width=8, init="uniform")
# MultiHyena: modes, attention, its own filter.
MULTI = replace(
    BASE,
    num_layers=3,
    max_positions=160,
    mixers=("hyena", "attn", "hyena"),
    hyena=HyenaConfig(head_size=4, filter=FILTER, modes=(5, 0, 0)),
)
# Hyena of order 3: modes behind two taps, and its own filter.
THIRD = replace(
    BASE,
    max_positions=160,
    mixers=("hyena", "hyena"),
    hyena=HyenaConfig(order=3, filter=FILTER, modes=(4, 0), taps=(2, 0)),
)
# All layers by modes: a text of any length in constant memory.
MODES = replace(
    BASE,
    max_positions=160,
    mixers=("hyena", "hyena"),
    hyena=HyenaConfig(filter=replace(FILTER, kind="modal", modes=4)),
)
CONFIGS = {"multi": MULTI, "third": THIRD, "modes": MODES}


@quick_jit
def _drawn(cfg: ModelConfig, key: Array) -> Params:
    """Sharper than at the start of training, so that tokens differ by more than rounding."""
    return jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, init_params(cfg, key))


@functools.cache
def params_of(cfg: ModelConfig, seed: int = 0) -> Params:
    """Random parameters; layers with modes have random ones that decay within tens of tokens."""
    params = _drawn(cfg, jax.random.key(seed))
    rng, layers = np.random.default_rng(seed), []
    for layer in params["layers"]:
        own = layer.get("hyena", {})
        if "modal" in own:
            layer = layer | {"hyena": own | {"modal": _modes(rng, own["modal"])}}
        layers.append(layer)
    return params | {"layers": tuple(layers)}


def _modes(rng: np.random.Generator, like: Params) -> Params:
    shape = like["nu"].shape
    poles = rng.uniform(0.7, 0.95, shape) * np.exp(1j * rng.uniform(-np.pi, np.pi, shape))
    residues = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / shape[1]
    taps = rng.standard_normal(like["taps"].shape) if "taps" in like else None
    made = modal_filter(poles, residues, rng.standard_normal(shape[0]), taps)
    return {name: jnp.asarray(getattr(made, name)) for name in like}


@functools.cache
def lm_of(name: str) -> LM:
    """One of `CONFIGS`; tests that use the same share its programs."""
    return LM(CONFIGS[name], params_of(CONFIGS[name]), name=name)
