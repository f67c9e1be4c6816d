"""What methods without training learn from a text: how large activations are in every layer.

A `Calibration` measures on its first use and keeps what it found, so that many methods and
densities share one reading of the text.

Axis letters: B rows of the text, T tokens, F neurons.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.config import ModelConfig
from jaxinfer.models.reach import check_positions
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.sparsity.masked import hidden_values, prompt_scores
from jaxinfer.sparsity.observe import WeightName, watch_inputs, watch_layers
from jaxinfer.typing import Params

LEVELS = np.linspace(0.0, 1.0, 513)
"""The shares below the magnitudes that a calibration keeps."""


class Calibration:
    """A dense model and the text that it is measured on.

    Args:
      cfg: of the model.
      params: its parameters; feed-forward blocks must be dense, their weights may be stored.
      tokens: i32[B, T], texts of training, never of evaluation.

    Raises:
      ValueError: a block is sparse already, or the tokens are no rows of the model's tokens.
    """

    def __init__(self, cfg: ModelConfig, params: Params, tokens: Any):
        self.cfg, self.params = cfg, params
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"calibration needs rows of token ids, all of one length, got {tokens.dtype}"
                f"{list(tokens.shape)}"
            )
        if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
            raise ValueError(
                f"calibration tokens must be from 0 to {cfg.vocab_size - 1}, got {tokens.min()} "
                f"to {tokens.max()}"
            )
        check_positions(cfg, tokens.shape[1])
        for index, layer in enumerate(params["layers"]):
            if isinstance(layer["mlp"], FeedForward):
                raise ValueError(
                    f"layer {index} has a {type(layer['mlp']).__name__} already; baselines are "
                    "made of the dense model"
                )
        self.tokens = jnp.asarray(tokens, jnp.int32)

    @functools.cached_property
    def activity(self) -> tuple[np.ndarray, ...]:
        """f32[F] per layer: the mean magnitude of every neuron's hidden value."""
        return self._blocks(_mean_magnitude)

    @functools.cached_property
    def gates(self) -> tuple[np.ndarray, ...]:
        """The magnitudes of the activated gate at `LEVELS`, per layer."""
        return self._blocks(_gate_levels)

    @functools.cached_property
    def prompt_scores(self) -> tuple[np.ndarray, ...]:
        """f32[B, F] per layer: GRIFFIN's statistic, each row taken as a prompt."""
        return self._blocks(_prompt_scores)

    @functools.cached_property
    def inputs(self) -> dict[WeightName, np.ndarray]:
        """The magnitudes of every weight's inputs at `LEVELS`."""
        found = watch_inputs(self.cfg, self.params, self.tokens, _input_levels)
        return {name: np.asarray(levels) for name, levels in found.items()}

    @functools.cached_property
    def memory(self) -> dict[Any, Any]:
        """What else methods keep between densities."""
        return {}

    def _blocks(self, of: Any) -> tuple[np.ndarray, ...]:
        found = watch_layers(self.cfg, self.params, self.tokens, of)
        return tuple(np.asarray(one) for one in found)


def threshold_at(levels: np.ndarray, density: float) -> float:
    """The magnitude above which a share `density` of the calibration's values lies; 0 for all."""
    return 0.0 if density >= 1 else float(np.interp(1 - density, LEVELS, levels))


def _levels(values: Array) -> Array:
    return jnp.quantile(jnp.abs(values.astype(jnp.float32)), jnp.asarray(LEVELS, jnp.float32))


def _mean_magnitude(cfg: ModelConfig, layer: Params, x: Array, _: Sequence[Array]) -> Array:
    hidden = hidden_values(cfg, layer["mlp"], x).hidden
    return jnp.abs(hidden.astype(jnp.float32)).mean(axis=(0, 1))


def _gate_levels(cfg: ModelConfig, layer: Params, x: Array, _: Sequence[Array]) -> Array:
    return _levels(hidden_values(cfg, layer["mlp"], x).gate)


def _prompt_scores(cfg: ModelConfig, layer: Params, x: Array, _: Sequence[Array]) -> Array:
    return prompt_scores(hidden_values(cfg, layer["mlp"], x).hidden)


def _input_levels(weight: Any, x: Array) -> Array:
    return _levels(x)
