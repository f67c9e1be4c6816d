"""`train_layer`: one layer under full-batch gradient descent, in float64, with what the theory
speaks of recorded on the way (arXiv 2310.00535, Theorem 1)."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.arguments import flag, of_kind, one_of, real, whole
from jaxinfer.theory.joma.contexts import Contexts
from jaxinfer.theory.joma.fields import ATTENTIONS, Attention
from jaxinfer.theory.joma.layer import Layer, attend, outputs
from jaxinfer.theory.measures.attention import entropy
from jaxinfer.theory.measures.spectrum import stable_rank
from jaxinfer.typing import Leaf

Activation = Literal["identity", "relu"]


class Records(NamedTuple):
    """The layer at S moments, and what was measured there; NumPy float64 in a `Training`."""

    layer: Layer  # each leaf with a leading axis S
    loss: Leaf  # [S]
    entropy: Leaf  # [S], mean over examples, of attention over the tokens of the context
    stable_rank: Leaf  # [S], of `v`
    saliency: Leaf  # [S, M, K], E[g_k phi'_k x_l]
    drift: Leaf  # [S, Q, M], the time integral of E_{q}[b s]; see `check`


@dataclass(frozen=True)
class Training:
    """A run of `train_layer`."""

    contexts: Contexts
    attention: Attention
    temperature: float
    ratio: float
    step: np.ndarray  # int[S], from 0 on
    records: Records


class _Rates(NamedTuple):
    v: Array
    z: Array
    out: Array  # 0 where the top layer is frozen
    temperature: Array
    slope: Array  # of the activation below 0


def train_layer(
    contexts: Contexts,
    attention: Attention = "softmax",
    activation: Activation = "identity",
    *,
    nodes: int = 8,
    steps: int = 2000,
    learning_rate: float = 0.05,
    ratio: float = 1.0,
    temperature: float = 1.0,
    train_top: bool = False,
    frozen_gradient: bool = False,
    records: int = 20,
    start: Layer | None = None,
    seed: int = 0,
) -> Training:
    """Trains one layer and returns its course.

    Args:
        contexts: the data, all of which makes one step.
        attention: "linear", "exp" or "softmax".
        activation: "identity" or "relu".
        nodes: K, hidden units.
        steps: of gradient descent.
        learning_rate: of all but the logits.
        ratio: the logits' learning rate over the others'.
        temperature: T in softmax(z / T).
        train_top: whether the map from hidden units to classes is trained.
        frozen_gradient: keep the gradient at the outputs as it is at the start: the assumption of
            the linear theory, which cross-entropy does not fulfil.
        records: moments that are kept, evenly spaced, beside the start.
        start: the layer to start from; by default v, query and out are normal with standard
            deviations 0.1, 0.1 and 1/sqrt(K), and logits are 0 (near 1 for linear attention).
        seed: of that start.

    Raises:
        ValueError: for arguments that do not fit, and if the loss stops being finite.
    """
    of_kind("contexts", contexts, Contexts, "Contexts, as multinomial_contexts() makes them")
    kind = one_of("attention", attention, ATTENTIONS)
    slope = {"identity": 1.0, "relu": 0.0}[one_of("activation", activation, ("identity", "relu"))]
    if flag("frozen_gradient", frozen_gradient) and flag("train_top", train_top):
        raise ValueError("frozen_gradient keeps the top layer too; leave out train_top")
    steps = whole("steps", steps)
    records = whole("records", records, 1, steps)
    if steps % records:
        raise ValueError(f"steps must be a multiple of records, got {steps} and {records}")
    rate = real("learning_rate", learning_rate, 0, 1e6)
    ratio, temperature = real("ratio", ratio, 0, 1e6), real("temperature", temperature, 1e-6, 1e6)
    if start is None:
        start = _first(contexts, kind, whole("nodes", nodes), np.random.default_rng(seed))
    _check_shapes(contexts, start)
    with jax.enable_x64(True):
        layer = Layer(*(jnp.asarray(x, jnp.float64) for x in start))
        values = (rate, rate * ratio, rate * train_top, temperature, slope)
        rates = _Rates(*(jnp.asarray(x, jnp.float64) for x in values))
        data = jnp.asarray(contexts.x), jnp.asarray(contexts.query), jnp.asarray(contexts.label)
        found = _run(kind, frozen_gradient, records, layer, data, rates, steps // records)
        found = jax.tree.map(np.asarray, found)
    if not np.isfinite(found.loss).all():
        raise ValueError(
            f"the loss is not finite after {steps} steps at learning rate {rate:g}; lower it"
        )
    step = np.arange(records + 1) * (steps // records)
    return Training(contexts, kind, temperature, ratio, step, found)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    kind: Attention, frozen: bool, records: int, layer: Layer, data, rates: _Rates, every: Array
) -> Records:
    x, query, label = data
    count = len(x)

    def forward(layer: Layer) -> tuple[Array, Array]:
        b = attend(kind, x, layer.z[query], rates.temperature)
        return b, b @ layer.v + layer.query[query]

    targets = jax.nn.one_hot(label, layer.out.shape[1])
    first = jax.nn.softmax(outputs(layer, forward(layer)[1], rates.slope))

    def loss(layer: Layer, before: Array) -> Array:
        logits = outputs(layer, before, rates.slope)
        if frozen:
            return -((targets - first) * logits).sum() / count
        return -(targets * jax.nn.log_softmax(logits)).sum() / count

    def push(layer: Layer) -> tuple[Array, Array]:
        """b [N, M] and g phi' / N [N, K], of the batch."""
        b, before = forward(layer)
        return b, -jax.grad(loss, 1)(layer, before)

    def step(_, carry: tuple[Layer, Array]) -> tuple[Layer, Array]:
        layer, drift = carry
        slopes = jax.grad(lambda layer: loss(layer, forward(layer)[1]))(layer)
        b, g = push(layer)
        s = (g * (b @ layer.v)).sum(axis=1)
        drift = drift.at[query].add(rates.v * b * s[:, None])
        moved = Layer(
            layer.v - rates.v * slopes.v, layer.query - rates.v * slopes.query,
            layer.z - rates.z * slopes.z, layer.out - rates.out * slopes.out,
        )  # fmt: skip
        return moved, drift

    def record(layer: Layer, drift: Array) -> Records:
        b, before = forward(layer)
        shares = jnp.abs(b) / jnp.abs(b).sum(axis=1, keepdims=True)
        return Records(
            layer, loss(layer, before), entropy(shares).mean(), stable_rank(layer.v),
            x.T @ push(layer)[1], drift,
        )  # fmt: skip

    def between(carry: tuple[Layer, Array], count: Array) -> tuple[tuple[Layer, Array], Records]:
        layer, drift = jax.lax.fori_loop(0, count, step, carry)
        return (layer, drift), record(layer, drift)

    counts = jnp.full(records + 1, every).at[0].set(0)  # the first record is of the start
    return jax.lax.scan(between, (layer, jnp.zeros_like(layer.z)), counts)[1]


def _first(contexts: Contexts, kind: Attention, nodes: int, rng: np.random.Generator) -> Layer:
    tokens, queries = contexts.x.shape[1], contexts.queries
    z = np.zeros((queries, tokens))
    if kind == "linear":
        z = 1 + 0.1 * rng.normal(size=z.shape)
    return Layer(
        0.1 * rng.normal(size=(tokens, nodes)), 0.1 * rng.normal(size=(queries, nodes)), z,
        rng.normal(size=(nodes, contexts.classes)) / np.sqrt(nodes),
    )  # fmt: skip


def _check_shapes(contexts: Contexts, start: Layer) -> None:
    of_kind("start", start, Layer, "a Layer")
    tokens, nodes = contexts.x.shape[1], np.shape(start.v)[-1]
    wanted = Layer(
        (tokens, nodes), (contexts.queries, nodes), (contexts.queries, tokens),
        (nodes, contexts.classes),
    )  # fmt: skip
    for name, array, shape in zip(Layer._fields, start, wanted, strict=True):
        if np.shape(array) != shape:
            raise ValueError(
                f"start.{name} must have the shape {list(shape)}, got {list(np.shape(array))}"
            )
