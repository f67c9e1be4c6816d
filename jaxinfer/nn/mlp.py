"""Gated and plain feed-forward blocks."""

from jaxtyping import Array, Float

from jaxinfer.config import ModelConfig
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import is_skinny, linear, linears
from jaxinfer.nn.sparse_mlp import SparseMlp
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params
from pallas_kernels.dispatch import dispatch, implementation_of


def feed_forward(
    cfg: ModelConfig,
    params: Params | SparseMlp,
    x: Float[Array, "B T D"],
    layer: int,
    backend: Backend | None = None,
) -> Float[Array, "B T D"]:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate; of a `SparseMlp` for the
    neurons that it selects.

    The signature is the one that `forward(mlp=...)` expects. `backend` as in
    `jaxinfer.nn.linear.linears`.
    """
    if isinstance(params, SparseMlp):
        return params(cfg, x, backend)
    is_gated = cfg.mlp(layer) == "gated"
    return linear(params["down"], _hidden(cfg, params, x, is_gated, backend), backend)


def _hidden(
    cfg: ModelConfig, params: Params, x: Array, is_gated: bool, backend: Backend | None
) -> Array:
    used = (params["up"], params["gate"]) if is_gated else (params["up"],)

    def reference(x, used, backend=None):
        up, *gate = linears(used, x, backend)
        return activate(cfg.activation, gate[0]) * up if gate else activate(cfg.activation, up)

    def kernel(x, used, *, interpret):
        from pallas_kernels.skinny_matmul import feed_forward_hidden

        up, gate = (*used, {})[:2]
        y = feed_forward_hidden(
            x.reshape(-1, x.shape[-1]), up["weight"], gate.get("weight"),
            activation=cfg.activation, up_bias=up.get("bias"), gate_bias=gate.get("bias"),
            implementation=implementation_of(interpret),
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], -1)

    if backend is None or not is_skinny(x, used):
        return reference(x, used, backend)
    return dispatch(backend.implementation, reference, kernel, x, used)
