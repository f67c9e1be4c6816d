"""What one layer makes of the tokens that it reads: its activations, as the model itself runs it.

The layer may be of any family (positions, windows, grouped heads, parallel blocks) and reads what
its cache policy stored of earlier tokens, or nothing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from jaxinfer.cache.attend import Rotations, attend, rotations
from jaxinfer.cache.context import StepContext
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.cache.weights_by_position import weights_by_position
from jaxinfer.config import ModelConfig
from jaxinfer.models.attention import attention_spec
from jaxinfer.models.offload import fetched
from jaxinfer.models.projections import project
from jaxinfer.models.stack import blocks
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import linear
from jaxinfer.nn.mlp import FeedForward, hidden_activations
from jaxinfer.nn.norm import norm, undivided
from jaxinfer.nn.rope import rotate
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.typing import Leaf, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a layer makes of one text; all arrays lead with its tokens.

    Inputs of blocks are those behind their norms, as `jaxinfer.models.stack.blocks` collects them.
    Queries and keys are rotated by their position in the text. Where another mixer than attention
    stands, `q`, `k`, `v` and `heads` are None; `gate` is None in blocks without one.
    """

    before: Leaf  # [T, D], the states in front of the layer
    attention_input: Leaf  # [T, D]
    q: Leaf  # [T, N, H]
    k: Leaf  # [T, K, H]
    v: Leaf  # [T, K, H]
    heads: Leaf  # [T, N, H], what attention gives, before the output projection
    mixed: Leaf  # [T, D], what the mixer adds to the states
    mlp_input: Leaf  # [T, D]
    gate: Leaf  # [T, F], behind the activation function
    hidden: Leaf  # [T, F], what the feed-forward block's `down` multiplies
    after: Leaf  # [T, D], the states behind the layer


def check_dense(layer: Params, index: int) -> None:
    """Refuses a layer of which a part is chosen by what it reads.

    Raises:
      ValueError: its feed-forward block or its heads are no dense ones.
    """
    is_block = isinstance(layer["mlp"], FeedForward)
    if is_block or layer.get("attn", {}).get("heads") is not None:
        what = "feed-forward block" if is_block else "attention"
        raise ValueError(
            f"the {what} of layer {index} is no dense one; give the model as it was before its "
            "blocks were replaced"
        )


def read_layer(
    cfg: ModelConfig,
    index: int,
    layer: Params,
    cache: Cache,
    x: Float[Array, "1 T D"],
    ctx: StepContext,
) -> tuple[Activations, tuple[Leaf, ...]]:
    """The activations of layer `index` for the tokens with states `x`, and what `commit` takes.
    `layer` and `cache` are of that layer alone."""
    layer = fetched(layer)
    (state,), (policy,) = cache.layers, cache.policies
    fed: list[Any] = []

    def watched(cfg: ModelConfig, block: Params, x: Array, at: int) -> Array:
        is_gated = cfg.mlp(at) == "gated"
        hidden = hidden_activations(cfg, block, x, is_gated)
        gate = activate(cfg.activation, linear(block["gate"], x))[0] if is_gated else None
        fed.extend((x, gate, hidden[0], linear(block["down"], hidden)))
        return fed[-1]

    layers = range(index, index + 1)
    after, fresh = blocks(cfg, {"layers": (layer,)}, cache, x, ctx, layers=layers, mlp=watched)
    mlp_input, gate, hidden, added = fed
    normed = norm(layer["attn_norm"], x, kind=cfg.norm, eps=cfg.norm_eps)
    own_norm = layer["attn_norm" if cfg.shared_norm else "mlp_norm"]
    q = k = v = heads = None
    if "attn" in layer:
        own = _inputs(cfg, index, layer, policy, normed, ctx)
        y, _ = attend(
            policy, own.spec, state, own.aux, own.q, own.k, own.v, ctx, own.phases, own.sink
        )
        turn = own.phases["absolute"]
        turned = (x if turn is None else rotate(x, turn) for x in (own.q, own.k))
        q, k, v, heads = (x[0].swapaxes(0, 1) for x in (*turned, own.v, y))
    return Activations(
        before=x[0],
        attention_input=undivided(layer["attn_norm"], normed)[0],
        q=q, k=k, v=v, heads=heads,
        mixed=(after - x - added)[0],
        mlp_input=undivided(own_norm, mlp_input)[0],
        gate=gate, hidden=hidden,
        after=after[0],
    ), fresh  # fmt: skip


def layer_weights(
    cfg: ModelConfig,
    index: int,
    layer: Params,
    cache: Cache,
    x: Float[Array, "1 T D"],
    ctx: StepContext,
    positions: int,
) -> Float[Array, "T N P"]:
    """The probability that each token gives to the text's first `positions` tokens, see
    `jaxinfer.cache.weights_by_position`. Extra letter: P positions."""
    layer = fetched(layer)
    (state,), (policy,) = cache.layers, cache.policies
    normed = norm(layer["attn_norm"], x, kind=cfg.norm, eps=cfg.norm_eps)
    own = _inputs(cfg, index, layer, policy, normed, ctx)
    found = weights_by_position(
        policy, own.spec, state, own.aux, own.q, own.k, own.v, ctx, own.phases, own.sink,
        positions=positions,
    )  # fmt: skip
    return found[0].swapaxes(0, 1)


class _Inputs(NamedTuple):
    spec: AttentionSpec
    q: Array  # [1, N, T, H], not yet rotated, as `k`
    k: Array
    v: Array
    phases: Rotations
    aux: Params | None
    sink: Array | None


def _inputs(
    cfg: ModelConfig, index: int, layer: Params, policy: Policy, normed: Array, ctx: StepContext
) -> _Inputs:
    """What the layer's attention works on, once more: the layer keeps it to itself."""
    params = layer["attn"]
    q, k, v = project(cfg, params, normed)
    phases = rotations(policy, cfg.rope, ctx)
    aux, sink = params.get("cache"), params.get("sink")
    return _Inputs(attention_spec(cfg, index), q, k, v, phases, aux, sink)
