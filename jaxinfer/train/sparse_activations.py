"""Next-token loss with an L1 on the hidden activations: it teaches a ReLU model to be sparse.

A growing L1 like that of ProSparse (arXiv 2402.13516), in one stage: the penalty is the sum over
layers of the mean absolute activation, over tokens and neurons; its weight rises along half a
cosine, so that the model first learns and then lets go of what it does not need. A step's weight is
part of its batch, which keeps the batch a pure function of the step (`jaxinfer.train.loop`).
"""

import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.nn.linear import linear
from jaxinfer.nn.mlp import hidden_activations
from jaxinfer.train.language_model import token_losses
from jaxinfer.train.loop import Loss
from jaxinfer.typing import Params


def growing_weight(step: int, peak: float, ramp: int) -> float:
    """The penalty's weight in update `step` (0-based): from 0 to `peak` within `ramp` updates."""
    risen = min(step / ramp, 1.0) if ramp else 1.0
    return peak * (1 - math.cos(math.pi * risen)) / 2


def losses_and_activity(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B U"]
) -> tuple[Float[Array, "B U-1"], Float[Array, " L"], Float[Array, " L"]]:
    """Losses of the tokens after the first, and per layer the mean absolute activation and the
    density: the share of activations that are not zero. Letters: L layers."""
    size: list[Array] = []
    density: list[Array] = []

    def recording(cfg: ModelConfig, block: Params, x: Array, layer: int) -> Array:
        hidden = hidden_activations(cfg, block, x, cfg.mlp(layer) == "gated")
        size.append(jnp.abs(hidden).mean())
        density.append((hidden != 0).mean())
        return linear(block["down"], hidden)

    losses = token_losses(cfg, params, tokens, recording)
    return losses, jnp.stack(size), jnp.stack(density)


def sparse_next_token_loss(cfg: ModelConfig) -> Loss:
    """A loss for `jaxinfer.train.loop.fit` on batches {"tokens": i32[B, T+1], "l1": f32[]}.

    Its metrics: `nats` per token, `l1` (the penalty before its weight), `density_0` and so on.
    """

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array):
        del key
        losses, size, density = losses_and_activity(cfg, params, batch["tokens"])
        nats, penalty = losses.mean(), size.sum()
        metrics = {"nats": nats, "l1": penalty}
        metrics |= {f"density_{layer}": density[layer] for layer in range(cfg.num_layers)}
        return nats + batch["l1"] * penalty, metrics

    return loss


def held_out_density(
    cfg: ModelConfig,
    params: Params,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    length: int,
    end: int,
    batch_size: int = 4,
    max_windows: int | None = None,
) -> Float[np.ndarray, " L"]:
    """Density of each layer, the mean over whole windows of documents as
    `jaxinfer.train.language_model.held_out_loss` cuts them, at most `max_windows` of them; what is
    left of a document is not read.
    """
    windows = []
    for row, _ in documents:
        if max_windows is not None and len(windows) >= max_windows:
            break
        row = np.asarray([end, *row], np.int32)
        windows += [row[at : at + length + 1] for at in range(0, len(row) - length, length)]
    windows = windows[:max_windows]
    if not windows:
        raise ValueError(f"no document has {length} tokens; give longer ones or a shorter length")

    @jax.jit
    def densities(params: Params, batch: jax.Array) -> jax.Array:
        return losses_and_activity(cfg, params, batch)[2]

    total = np.zeros(cfg.num_layers)
    for first in range(0, len(windows), batch_size):
        batch = np.stack(windows[first : first + batch_size])
        total += len(batch) * np.asarray(densities(params, batch))
    return total / len(windows)
