"""MoEfication (arXiv 2110.01786): a trained block's neurons are grouped into experts, and a small
network learns which experts a token uses; the block's weights stay as they are.

The router's recipe is that of the authors' repository: inputs of length 1, two linear layers with
tanh between them that begin as the experts' mean input weights and as the identity, the experts'
sums of activations over the largest of the batch as targets of a cross-entropy, Adam at 0.01, the
epoch with the most activation among the top fifth of the experts. It sums positive activations of
ReLU; of other functions magnitudes are summed here.

Axis letters: R rows, D width, F neurons, J experts.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxinfer.config import ModelConfig
from jaxinfer.sparsity.base import Rule, Selector
from jaxinfer.sparsity.calibration import Calibration
from jaxinfer.sparsity.grouping import group_neurons, input_weights
from jaxinfer.sparsity.learned import permuted
from jaxinfer.sparsity.masked import hidden_values, in_blocks
from jaxinfer.sparsity.observe import watch_layers
from jaxinfer.typing import Leaf, Params

EPOCHS, BATCH, RATE = 30, 512, 1e-2
TEST, TOP = 0.1, 0.2  # the rows that judge epochs, and the experts that they are judged by


class Experts(NamedTuple):
    """One layer's neurons, grouped."""

    block: Params  # the dense block in the order of its groups
    centres: Array  # f32[J, D], the means of the groups' input weights, of length 1 each


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ExpertRouter(Selector):
    """Scores `outer tanh(inner x / |x|)`."""

    outer: Leaf  # [J, J]
    inner: Leaf  # [J, D]
    rule: Rule = field(metadata={"static": True})

    @property
    def units(self) -> int:
        return self.outer.shape[0]

    @property
    def width(self) -> int:
        """D, the width of what it reads."""
        return self.inner.shape[1]

    def __call__(self, sites: Sequence[Float[Array, "B T D"]]) -> Bool[Array, "R J"]:
        x = unit(sites[-1].reshape(-1, self.width))
        return self.rule(_scores((self.inner, self.outer), x))

    def share(self) -> float:
        return self.rule.share(self.units)


def experts(calibration: Calibration, size: int) -> list[Experts]:
    """Every layer's experts of `size` neurons; grouped once."""
    key = "experts", size
    if key not in calibration.memory:
        calibration.memory[key] = [
            _grouped(layer["mlp"], size) for layer in calibration.params["layers"]
        ]
    return calibration.memory[key]


def routers(calibration: Calibration, size: int) -> list[tuple[Array, Array]]:
    """Every layer's trained (inner, outer); trained once."""
    key = "expert routers", size
    if key not in calibration.memory:
        cfg, tokens = calibration.cfg, calibration.tokens
        inputs = watch_layers(cfg, calibration.params, tokens, _block_input)
        calibration.memory[key] = [
            _trained(cfg, one.block, one.centres, x.reshape(-1, x.shape[-1]))
            for one, x in zip(experts(calibration, size), inputs, strict=True)
        ]
    return calibration.memory[key]


def unit(x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    """Rows of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _grouped(dense: Params, size: int) -> Experts:
    features = input_weights(dense)
    order = group_neurons(features, size).order
    centres = features[order].reshape(-1, size, features.shape[1]).mean(axis=1)
    return Experts(permuted(dense, jnp.asarray(order)), unit(jnp.asarray(centres)))


def _block_input(cfg: ModelConfig, layer: Params, x: Array, sites: Sequence[Array]) -> Array:
    return x


def _scores(params: Leaf, x: Array) -> Array:
    inner, outer = params
    return jnp.tanh(x @ inner.T) @ outer.T


def _trained(cfg: ModelConfig, block: Params, centres: Array, x: Array) -> tuple[Array, Array]:
    """The router of the best epoch; rows are drawn in the order that a fixed seed gives."""
    count, test = len(centres), max(int(TEST * len(x)), 1)
    if len(x) <= 2 * test:
        raise ValueError(f"{len(x)} rows are too few to train a router and to judge it; give more")
    hidden = jnp.abs(hidden_values(cfg, block, x[None]).hidden[0].astype(jnp.float32))
    mass, x = in_blocks(hidden, hidden.shape[-1] // count), unit(x)
    order = np.random.default_rng(0).permutation(len(x))
    known, judged = order[test:], order[:test]
    batch = min(BATCH, len(known))
    params = (centres, jnp.eye(count, dtype=jnp.float32))
    state = optax.adam(RATE).init(params)
    best, found = -1.0, params
    for epoch in range(EPOCHS):
        rows = np.random.default_rng([1, epoch]).permutation(known)
        rows = jnp.asarray(rows[: len(rows) // batch * batch].reshape(-1, batch))
        params, state, captured = _epoch(params, state, x, mass, rows, jnp.asarray(judged))
        if float(captured) > best:
            best, found = float(captured), params
    return found


@functools.partial(jax.jit, donate_argnums=1)
def _epoch(params, state, x: Array, mass: Array, rows: Array, judged: Array):
    """One pass over the rows, and the share of the judged rows' activation that the best-scored
    experts hold."""

    def loss(params, picked: Array) -> Array:
        target = mass[picked] / jnp.maximum(mass[picked].max(), 1e-12)
        return optax.sigmoid_binary_cross_entropy(_scores(params, x[picked]), target).mean()

    def step(carry, picked: Array):
        params, state = carry
        updates, state = optax.adam(RATE).update(jax.grad(loss)(params, picked), state)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), rows)
    top = max(round(TOP * mass.shape[1]), 1)
    chosen = jax.lax.top_k(_scores(params, x[judged]), top)[1]
    held = jnp.take_along_axis(mass[judged], chosen, axis=1).sum()
    return params, state, held / jnp.maximum(mass[judged].sum(), 1e-12)
