"""The losses of drafts: how far their next-token distributions are from the target's."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.config import ModelConfig
from jaxinfer.models.recurrent import guesses, read
from jaxinfer.models.stack import forward, unembed
from jaxinfer.train.loop import Loss
from jaxinfer.typing import Params

UNROLL, DECAY = 4, 0.7  # tokens that a recurrent draft learns to guess ahead, and their weights
POSITIONS = 64  # of a window that it learns from in one step
NO_STATE = 0.05  # share of them that must do without the target's state


def distillation(cfg: ModelConfig, draft: ModelConfig) -> Loss:
    """A loss for `fit` on batches {"tokens": i32[B, T], "hidden": [B, T, D], "head": ..., "fixed":
    ...}: `hidden` are the target's states in front of its head, `head` what `unembed` reads."""

    def loss(trained: Params, batch: Any, key: Array):
        del key
        hidden = batch["hidden"].astype(jnp.float32)
        if "draft_vocabulary" in batch["fixed"]:
            wanted = hidden @ batch["fixed"]["head"]["weight"].T
        else:
            wanted = unembed(cfg, batch["head"], hidden)
        params = {**batch["fixed"], **trained}
        return _divergence(wanted, forward(draft, params, batch["tokens"]).logits)

    return loss


def unrolled() -> Loss:
    """The loss of a recurrent draft: its guesses of the next `UNROLL` tokens behind some positions
    of each window, deeper ones by the share of trees that come so far."""

    def loss(trained: Params, batch: Any, key: Array):
        params, tokens = {**batch["fixed"], **trained}, batch["tokens"]
        hidden = batch["hidden"].astype(jnp.float32)
        place_key, drop_key = jax.random.split(key)
        last = tokens.shape[1] - UNROLL - 1
        count = min(POSITIONS, last)
        place = jax.vmap(lambda k: jax.random.choice(k, last, (count,), replace=False))(
            jax.random.split(place_key, len(tokens))
        )
        state = jnp.take_along_axis(hidden, place[..., None], axis=1)
        # the first step of a text knows no state
        known = jax.random.bernoulli(drop_key, 1 - NO_STATE, (*place.shape, 1))
        state, total, metrics = jnp.where(known, state, 0.0), jnp.zeros(()), {}
        for depth in range(UNROLL):
            place = place + 1
            state = read(params, state, jnp.take_along_axis(tokens, place, axis=1))
            behind = jnp.take_along_axis(hidden, place[..., None], axis=1)
            value, found = _divergence(behind @ params["head"]["weight"].T, guesses(params, state))
            total = total + DECAY**depth * value
            metrics |= {f"{name}_{depth}": one for name, one in found.items()}
        metrics |= {name: metrics[f"{name}_0"] for name in ("overlap", "agreement")}
        return total / sum(DECAY**depth for depth in range(UNROLL)), metrics

    return loss


def _divergence(wanted: Array, given: Array) -> tuple[Array, dict[str, Array]]:
    """KL of softmax(given) from softmax(wanted), their overlap, and how often both choose alike."""
    wanted, given = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (wanted, given))
    p, q = jnp.exp(wanted), jnp.exp(given)
    return (p * (wanted - given)).sum(axis=-1).mean(), {
        "overlap": jnp.minimum(p, q).sum(axis=-1).mean(),
        "agreement": (jnp.argmax(wanted, -1) == jnp.argmax(given, -1)).mean(),
    }
