"""A random model whose neurons and heads are worth predicting, and its predictors.

Its neurons have thresholds, so that a token needs few of them, and attention reaches a few tokens
back, so that a token's embedding says less than what stands at the block. Values have biases: a
head's norm then follows its input, as a linear predictor can.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxinfer.models.params import init_params
from jaxinfer.train.dejavu.recipe import DejavuRecipe
from jaxinfer.typing import Params
from tests.factories import CONFIGS, random_tokens

CFG = replace(
    CONFIGS["learned"], activation="relu", hidden_size=64, intermediate_size=128, head_dim=16,
    mlp_bias=True, positions="alibi", alibi_slopes=(0.5,) * 4,
)  # fmt: skip
TOKENS = random_tokens(48, 64)
HELD_OUT = 5  # sequences
RECIPE = DejavuRecipe(
    steps=300, batch=256, learning_rate=5e-3, heads=0.5, validation=0.1, evaluations=3
)


@functools.cache
def toy_params() -> Params:
    params = jax.tree.map(
        lambda x: 2 * x if x.ndim == 2 else x, init_params(CFG, jax.random.key(0))
    )
    for layer in params["layers"]:
        up, value = layer["mlp"]["up"], layer["attn"]["v"]
        up["bias"] = -jnp.linalg.norm(up["weight"], axis=1)
        value["bias"] = 2 * jax.random.normal(jax.random.key(5), value["bias"].shape)
    return params
