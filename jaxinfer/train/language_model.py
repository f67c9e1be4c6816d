"""Next-token loss of a `ModelConfig`, for training and for held-out evaluation.

Both go through `jaxinfer.models.stack.forward` with no cache: the forward that is trained is
the one that is served. Losses are in nats per token, accumulated in float32.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.models.stack import Mlp, forward
from jaxinfer.typing import Params

Loss = Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def token_losses(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B U"], mlp: Mlp | None = None
) -> Float[Array, "B U-1"]:
    """Cross-entropy of each token after the first, given those before it; `mlp` as in `forward`."""
    logits = forward(cfg, params, tokens[:, :-1], mlp=mlp).logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def next_token_loss(cfg: ModelConfig) -> Loss:
    """A loss for `jaxinfer.train.loop.fit` on batches i32[B, T+1]; it uses no randomness."""

    def loss(params: Params, batch: jax.Array, key: jax.Array):
        del key
        return token_losses(cfg, params, batch).mean(), {}

    return loss


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss summed over documents, and the sizes to normalise it by."""

    nats: float
    tokens: int
    size: int  # bytes of text, so that tokenizers can be compared
    documents: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.size


def held_out_loss(
    cfg: ModelConfig,
    params: Params,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    length: int,
    end: int,
    batch_size: int = 8,
    max_windows: int | None = None,
) -> HeldOutLoss:
    """Loss on whole documents given as (tokens, bytes of text), every token predicted once.

    A document becomes `end` + its tokens, cut into windows of `length` + 1 that share one token; a
    window sees nothing before its start, so long documents are charged for short contexts. With
    `max_windows`, documents are added whole until that many windows are filled.
    """
    windows, tokens, size, count = [], 0, 0, 0
    for row, row_bytes in documents:
        if max_windows is not None and len(windows) >= max_windows:
            break
        row = np.asarray([end, *row], np.int32)
        for start in range(0, len(row) - 1, length):
            windows.append(row[start : start + length + 1])
        tokens, size, count = tokens + len(row) - 1, size + row_bytes, count + 1
    if not count:
        raise ValueError(
            "no held-out documents were given; fetch the texts or choose other sources"
        )

    @jax.jit
    def batch_nats(params: Params, batch: jax.Array, ok: jax.Array) -> jax.Array:
        return jnp.where(ok, token_losses(cfg, params, batch), 0.0).sum()

    nats = 0.0
    for first in range(0, len(windows), batch_size):
        batch = np.full((batch_size, length + 1), end, np.int32)
        ok = np.zeros((batch_size, length), bool)
        for b, window in enumerate(windows[first : first + batch_size]):
            batch[b, : len(window)] = window
            ok[b, : len(window) - 1] = True
        nats += float(batch_nats(params, batch, ok))
    return HeldOutLoss(nats, tokens, size, count)
