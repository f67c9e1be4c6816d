"""Gated and plain feed-forward blocks."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from jaxinfer.config import ModelConfig
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import is_skinny, linear, linears
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels.skinny_matmul import feed_forward_hidden


class FeedForward:
    """A block of another kind than a dense one. It stands in the parameter tree where the weights
    of a dense block do, is a pytree itself, and computes itself."""

    def __call__(
        self,
        cfg: ModelConfig,
        x: Float[Array, "B T D"],
        sites: Sequence[Array] = (),
        backend: Backend | None = None,
    ) -> Float[Array, "B T D"]:
        """The block's output for `x`, which its weights multiply. `sites` are the inputs of all
        blocks so far, see `jaxinfer.models.stack.blocks`: what selects reads these. The last is
        `x`, but for what was divided into the norm in front."""
        raise NotImplementedError

    def as_dense(self) -> Params | None:
        """The weights as a dense block has them, for what stores them in fewer bits; None where
        they stay as they are."""
        return None

    def holding(self, dense: Params) -> "FeedForward":
        """The block with such weights instead of its own."""
        raise NotImplementedError

    def hidden(
        self, cfg: ModelConfig, x: Float[Array, "B T D"], sites: Sequence[Array] = ()
    ) -> Float[Array, "R F"]:
        """What `down` multiplies, of a block that has weights `as_dense`."""
        raise NotImplementedError

    def read_bytes(self, rows: int = 1, backend: Backend | None = None) -> int:
        """Bytes of parameters that a step of `rows` tokens is expected to read on `backend`
        (default: this machine's)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def typical(self, rows: int = 1) -> "FeedForward":
        """The block with the cost that steps of `rows` tokens are expected to have, whatever the
        inputs: what a measurement without a text runs."""
        return self


def feed_forward(
    cfg: ModelConfig,
    params: Params | FeedForward,
    x: Float[Array, "B T D"],
    layer: int,
    backend: Backend | None = None,
    sites: Sequence[Array] = (),
) -> Float[Array, "B T D"]:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate; what a `FeedForward`
    makes of it.

    The signature is the one that `forward(mlp=...)` expects. `backend` as in
    `jaxinfer.nn.linear.linears`.
    """
    if isinstance(params, FeedForward):
        return params(cfg, x, sites or (x,), backend)
    is_gated = cfg.mlp(layer) == "gated"
    hidden = hidden_activations(cfg, params, x, is_gated, backend)
    return linear(params["down"], hidden, backend)


def hidden_activations(
    cfg: ModelConfig,
    params: Params,
    x: Float[Array, "B T D"],
    is_gated: bool,
    backend: Backend | None = None,
) -> Float[Array, "B T F"]:
    """What `down` multiplies in a dense block."""
    used = (params["up"], params["gate"]) if is_gated else (params["up"],)
    if backend is not None and backend.has_kernels and is_skinny(x, used):
        up, gate = (*used, {})[:2]
        return feed_forward_hidden(
            x, up["weight"], gate.get("weight"), activation=cfg.activation, up_bias=up.get("bias"),
            gate_bias=gate.get("bias"), implementation=backend.implementation,
        )  # fmt: skip
    up, *gate = linears(used, x, backend)
    return activate(cfg.activation, gate[0]) * up if gate else activate(cfg.activation, up)
