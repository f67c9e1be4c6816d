"""A recurrent draft: guesses that grow from the state in which the target was when it last spoke.

The target's last hidden state knows more of the text than any small model of its own could find
out. A cell takes it and the token that came next to a state from which the token after that is
guessed, and so on down the tree (ReDrafter, arXiv 2403.09919; Hydra, 2402.05109; EAGLE, 2401.15077,
with attention). It has no cache and reads no prompt:

    z = join [rms(state), rms(embedding)];   z += down(silu(gate(rms z)) * up(rms z)) per block
    next state = z;   logits = head(rms z)

Embedding and head are the target's own, the head's rows those of the tokens that it can propose.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.nn.linear import linear, product, rows
from jaxinfer.nn.norm import norm
from jaxinfer.speculative.drafters import METHODS, Method, pass_order
from jaxinfer.speculative.grow import check_branching, grow
from jaxinfer.speculative.verify import Rule
from jaxinfer.typing import Params

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """Sizes of a cell; `hidden_size` and the meaning of its tokens are the target's."""

    hidden_size: int
    intermediate_size: int
    blocks: int
    vocab_size: int  # tokens that it can propose


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


@dataclass(frozen=True, kw_only=True)
class RecurrentDrafter:
    """Grows trees with a cell. Its state is f32[B, D], the target's hidden state that chose the
    root; zeros before the first step, whose guesses know the root alone."""

    size: int = 64
    method: Method = "sequoia"

    @property
    def rule(self) -> Rule:
        return METHODS[self.method][1]

    def check(self, topology) -> None:
        check_branching(topology, self.size)

    def propose(self, params, topology, sampler, keys, state, root, seen):
        order, states = pass_order(topology), state[:, None]  # of the token before the root, first

        def logits(level: int, nodes: np.ndarray, tokens: Array) -> Array:
            nonlocal states
            above = np.asarray(topology.parent)[nodes]
            place = 1 + np.searchsorted(order, above) if level > 0 else np.zeros(1, np.int32)
            fresh = read(params, states[:, place], tokens[:, nodes])
            states = jnp.concatenate([states, fresh], axis=1)
            return guesses(params, fresh)

        proposal = grow(
            topology, sampler, keys, root, seen, logits, draws=METHODS[self.method][0],
            size=self.size, vocabulary=params["draft_vocabulary"],
        )  # fmt: skip
        return proposal, None

    def commit(self, params, topology, state, drafted, proposal, path, emitted, count, hidden):
        end = jnp.maximum(count - 1, 0)[:, None]
        nodes = jnp.take_along_axis(path, end, axis=1)
        last = jnp.take_along_axis(hidden, nodes[..., None], axis=1)[:, 0].astype(state.dtype)
        return jnp.where((count > 0)[:, None], last, state)
