"""A recurrent draft: a cell that guesses tokens from the target's last hidden state.

That state knows more of the text than a small model of its own could find out. The cell turns it
and the next token into a new state, from which the token after that is guessed, and so on
(ReDrafter, arXiv 2403.09919; Hydra, 2402.05109; EAGLE, 2401.15077, with attention). It has no cache
and reads no prompt:

    z = join [rms(state), rms(embedding)];   z += down(silu(gate(rms z)) * up(rms z)) per block
    next state = z;   logits = head(rms z)

Embedding and head are the target's own, the head's rows those of the tokens that it can propose.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.arguments import whole
from jaxinfer.nn.linear import linear, product, rows
from jaxinfer.nn.norm import norm
from jaxinfer.typing import Params

EPS = 1e-5
MOST_BLOCKS = 64
"""One pays; a forged file may not make us unroll a million."""


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """Sizes of a cell; `hidden_size` and the meaning of its tokens are the target's."""

    hidden_size: int
    intermediate_size: int
    blocks: int
    vocab_size: int  # tokens that it can propose

    def __post_init__(self):
        whole("hidden_size", self.hidden_size)
        whole("intermediate_size", self.intermediate_size)
        whole("blocks", self.blocks, least=0, most=MOST_BLOCKS)
        whole("vocab_size", self.vocab_size)


@dataclass(frozen=True, eq=False)
class RecurrentDraft:
    """What `speculate` takes as a draft. `params` are all that `read` needs."""

    config: RecurrentConfig
    params: Params = field(repr=False)
    name: str = "recurrent"


def init_cell(cfg: RecurrentConfig, key: Array) -> Params:
    """Random parameters of a cell; its blocks begin as nothing."""
    d, f = cfg.hidden_size, cfg.intermediate_size
    keys = jax.random.split(key, 2 * cfg.blocks + 1)

    def weight(key: Array, outputs: int, inputs: int) -> Params:
        return {"weight": jax.random.normal(key, (outputs, inputs)) * inputs**-0.5}

    def block(up: Array, gate: Array) -> Params:
        return {
            "norm": {"scale": jnp.ones(d)},
            "up": weight(up, f, d),
            "gate": weight(gate, f, d),
            "down": {"weight": jnp.zeros((d, f))},
        }

    return {
        "join": weight(keys[-1], d, 2 * d),
        "blocks": tuple(block(*keys[2 * i : 2 * i + 2]) for i in range(cfg.blocks)),
        "final_norm": {"scale": jnp.ones(d)},
    }


def read(
    params: Params, state: Float[Array, "B W D"], tokens: Int[Array, "B W"]
) -> Float[Array, "B W D"]:
    """The state after each of `tokens`, from the one before it."""
    embedded = rows(params["embed"]["tokens"], tokens).astype(state.dtype)
    z = linear(params["join"], jnp.concatenate([_rms(state), _rms(embedded)], axis=-1))
    for block in params["blocks"]:
        x = norm(block["norm"], z, kind="rms", eps=EPS)
        z = z + linear(
            block["down"], jax.nn.silu(linear(block["gate"], x)) * linear(block["up"], x)
        )
    return z


def guesses(params: Params, state: Float[Array, "B W D"]) -> Float[Array, "B W V"]:
    """Logits of the tokens that the cell can propose."""
    x = norm(params["final_norm"], state, kind="rms", eps=EPS)
    return product(x, params["head"]["weight"], jnp.float32)


def _rms(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)
