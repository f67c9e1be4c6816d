"""`learn_hierarchy`: do the hidden units of layer l come to stand for latents of level l + 1?

A small decoder learns the class of a context (arXiv 2310.00535, section 5 and Table 1). The answer
is the normalised correlation between a latent and the best hidden unit. An untrained network scores
high already, as inputs are few and hidden units many: so it is always measured beside, and beside
it one whose attention is kept as it was at the start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxinfer.arguments import of_kind, real, whole
from jaxinfer.theory.joma.grammar import Grammar
from jaxinfer.theory.joma.trees import LatentTree
from jaxinfer.theory.measures.correlation import normalised_correlation

Batch = tuple[Array, Array, tuple[Array, ...]]
"""Inputs int32[E, T], labels int32[E], latents bool[E, n] per level from 1 upwards."""


class Decoder(nn.Module):
    """Post-norm blocks without positions: the class, and each layer's hidden units.

    Attention has no output projection, and its softmax ranges over what is before and at a token.
    """

    tokens: int
    classes: int
    layers: int
    width: int

    @nn.compact
    def __call__(self, inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        """Logits [E, C] at the last position, and per layer the largest activation over positions
        of each hidden unit, [E, 4 width]."""
        x = nn.Embed(self.tokens, self.width, name="embed")(inputs)
        size = inputs.shape[1]
        causal = jnp.where(jnp.tri(size, dtype=bool), 0.0, -jnp.inf)
        hidden = []
        for layer in range(self.layers):
            q, k, v = (
                nn.Dense(self.width, use_bias=False, name=f"{part}_{layer}")(x) for part in "qkv"
            )
            scores = jnp.einsum("etd,esd->ets", q, k) / np.sqrt(self.width) + causal
            x = nn.LayerNorm()(x + jax.nn.softmax(scores) @ v)
            active = nn.relu(nn.Dense(4 * self.width)(x))
            hidden.append(active.max(axis=1))
            x = nn.LayerNorm()(x + nn.Dense(self.width)(active))
        return nn.Dense(self.classes)(x[:, -1]), tuple(hidden)


@dataclass(frozen=True)
class Learned:
    """Mean over latents of the best correlation, of each layer, and the loss on the same inputs."""

    correlation: np.ndarray  # float64[layers]
    loss: float


@dataclass(frozen=True)
class Hierarchy:
    """What `learn_hierarchy` measured, each on the same inputs."""

    untrained: Learned
    frozen_attention: Learned
    trained: Learned

    @property
    def gain(self) -> np.ndarray:
        """What training adds to the correlation of each layer. Look at layer 1 and above."""
        return self.trained.correlation - self.untrained.correlation


def learn_hierarchy(
    source: LatentTree | Grammar, *, layers: int | None = None, width: int = 128,
    steps: int = 2000, learning_rate: float = 1e-4, batch: int = 128, held_out: int = 1024,
    seed: int = 0,
) -> Hierarchy:  # fmt: skip
    """Trains the decoder, with and without its attention, and measures it.

    Args:
        source: a tree, of which every step sees new examples and the measure others, or a grammar,
            all of whose inputs make one step and are measured (it has no others).
        layers: of the decoder; by default one per level of latents.
        width: of its states; four times as many hidden units.
        steps: of Adam.
        learning_rate: of Adam.
        batch: examples of a step, from a tree.
        held_out: examples to measure on, from a tree.
        seed: of parameters and examples.

    Raises:
        ValueError: for arguments that do not fit.
    """
    of_kind("source", source, (LatentTree, Grammar), "a latent_tree() or a grammar()")
    levels = len(source.rho) if isinstance(source, LatentTree) else len(source.latents)
    layers = levels if layers is None else whole("layers", layers, 1, levels)
    whole("steps", steps)
    key, first, test = jax.random.split(jax.random.key(seed), 3)
    draw, classes, tokens = _reader(source, whole("batch", batch))
    model = Decoder(tokens, classes, layers, whole("width", width))
    inputs, labels, latents = _reader(source, whole("held_out", held_out))[0](test)
    inputs, labels, latents = _reader(source, whole("held_out", held_out))[0](test)
    start = jax.jit(model.init)(first, inputs[:1])["params"]
    rate = real("learning_rate", learning_rate, 0, 10)
    train, apply = _trainer(model, draw, jax.random.split(key, steps), rate), jax.jit(model.apply)

    def measured(params: Any) -> Learned:
        logits, hidden = apply({"params": params}, inputs)
        loss = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels).mean()
        pairs = zip(latents[:layers], hidden, strict=True)
        scores = [best_correlation(np.asarray(a), np.asarray(b)).mean() for a, b in pairs]
        return Learned(np.array(scores), float(loss))

    return Hierarchy(measured(start), measured(train(start, "qk")), measured(train(start, "")))


def best_correlation(latents: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Of each latent [E, n], the largest normalised correlation with a hidden unit [E, F]; latents
    that never change are left out."""
    changing = latents[:, latents.any(axis=0) & ~latents.all(axis=0)].astype(np.float64)
    pairs = normalised_correlation(changing.T[:, None], hidden.T[None].astype(np.float64))
    return pairs.max(axis=1)


def _trainer(
    model: Decoder, draw: Callable[[Array], Batch], keys: Array, rate: float
) -> Callable[[Any, str], Any]:
    """`train(params, frozen)`: the parameters after a step of Adam per key. Projections whose name
    begins with a letter of `frozen` and a line stay."""
    optimizer = optax.adam(rate)

    def loss(params: Any, inputs: Array, labels: Array) -> Array:
        logits: Any = model.apply({"params": params}, inputs)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train(params: Any, moves: dict[str, Array]) -> Any:
        def step(carry: tuple[Any, Any], key: Array):
            params, state = carry
            inputs, labels, _ = draw(key)
            updates, state = optimizer.update(jax.grad(loss)(params, inputs, labels), state)
            updates = {
                name: jax.tree.map(lambda x, name=name: x * moves[name], part)
                for name, part in updates.items()  # type: ignore[union-attr]
            }
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    run = jax.jit(train)  # one program: what stays is an input

    def chosen(params: Any, frozen: str) -> Any:
        return run(params, {k: jnp.float32(k[1] != "_" or k[0] not in frozen) for k in params})

    return chosen


def _reader(
    source: LatentTree | Grammar, examples: int
) -> tuple[Callable[[Array], Batch], int, int]:
    """What gives a batch for a key, the number of classes, and that of tokens with padding."""
    if isinstance(source, LatentTree):

        def drawn(key: Array) -> Batch:
            first, second = jax.random.split(key)
            found = source.sample(first, examples)
            return source.sequences(second, found), found.label, found.nodes[1:]

        return drawn, len(source.first), source.tokens + 1
    labels = jnp.arange(source.classes)
    every = jnp.asarray(source.inputs), labels, tuple(map(jnp.asarray, source.latents))
    return lambda key: every, source.classes, source.tokens
