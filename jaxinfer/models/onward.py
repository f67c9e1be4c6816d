"""The rest of a model behind some layer, and what it predicts: for states that were changed on the
way."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.models.activations import Activations
from jaxinfer.models.layer_reader import LayerReader
from jaxinfer.models.mixers import mixer_of
from jaxinfer.models.stack import unembed
from jaxinfer.models.walk import HasParameters
from jaxinfer.nn.norm import norm
from jaxinfer.typing import Params

ROWS = 128  # tokens whose logits exist at a time


class Onward:
    """A model from any layer on, without a cache, for texts of equally many tokens."""

    def __init__(self, model: HasParameters, tokens: Int[np.ndarray, "Q T"]):
        self.model, self.tokens = model, tokens
        self._reader = LayerReader(model.config, tokens.shape[1], _nothing)
        self._nll = jax.jit(_nll, static_argnums=0)

    def loss(self, states: Float[np.ndarray, "Q T D"], layer: int) -> float:
        """The mean of `losses` over the texts."""
        return float(self.losses(states, layer).mean())

    def losses(self, states: Float[np.ndarray, "Q T D"], layer: int) -> Float[np.ndarray, " Q"]:
        """Each text's mean negative log-likelihood in nats of all tokens but the first, for
        `states` in front of layer `layer` (the number of layers: behind the last one)."""
        cfg, params = self.model.config, self.model.params
        states = states.copy()
        for index in range(layer, cfg.num_layers):
            own = params["layers"][index]
            name, mixer = mixer_of(own)
            own = own | {name: mixer.served(cfg, own[name])}
            for _ in self._reader.each(index, own, states):
                pass
        rest = {name: x for name, x in params.items() if name != "layers"}
        found = [
            np.asarray(self._nll(cfg, rest, one, row))
            for one, row in zip(states, self.tokens, strict=True)
        ]
        return np.asarray(found, np.float64).mean(axis=1)


def _nothing(index: int, layer: Params, found: Activations) -> dict[str, Array]:
    return {}


def _nll(cfg: ModelConfig, params: Params, states: Array, tokens: Array) -> Array:
    """f32[T - 1]."""
    hidden, targets = states[:-1], tokens[1:]
    count = -(-len(hidden) // ROWS)
    pad = count * ROWS - len(hidden)
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(count, ROWS, -1)
    targets = jnp.pad(targets, (0, pad)).reshape(count, ROWS)

    def of(block: tuple[Array, Array]) -> Array:
        x, wanted = block
        x = x.astype(params["final_norm"]["scale"].dtype)[None]
        x = norm(params["final_norm"], x, kind=cfg.norm, eps=cfg.norm_eps)
        log_probs = jax.nn.log_softmax(unembed(cfg, params, x)[0])
        return -jnp.take_along_axis(log_probs, wanted[:, None], axis=1)[:, 0]

    return jax.lax.map(of, (hidden, targets)).reshape(-1)[: len(tokens) - 1]
