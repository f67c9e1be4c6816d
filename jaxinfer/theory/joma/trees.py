"""`latent_tree`: a hierarchical binary latent tree, whose leaves are the tokens of a context.

The root is the class label, all below it is binary. Leaves stand at level 0, the binary nodes below
the root at level L - 1; token l is in the context if its leaf is 1. A child equals its parent with
probability (1 + rho) / 2, with a rho per level if wanted. How often two tokens occur together then
depends on how high up their common ancestor is (arXiv 2310.00535, section 5; `co_occurrence` is
derived here, and agrees with simulation).

Letters: B branches of a node, N nodes below the root, C classes, E examples.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.arguments import whole
from jaxinfer.theory.joma.vectors import Numbers, finite_array

MOST_LEAVES = 1_000_000


class Examples(NamedTuple):
    """E examples of a tree."""

    label: Array  # int32[E]
    nodes: tuple[Array, ...]  # bool[E, nodes of the level], from level 0 (the tokens) upwards


@dataclass(frozen=True)
class LatentTree:
    """A tree as `latent_tree` makes it.

    `rho`: that of the edges from level i + 1 to level i, for i from 0. `first`: the probability of
    a 1 in each node below the root, given the class, float64[C, N].
    """

    branches: int
    rho: tuple[float, ...]
    first: np.ndarray

    @property
    def levels(self) -> int:
        """L, the level of the root."""
        return len(self.rho) + 1

    @property
    def tokens(self) -> int:
        """How many leaves there are."""
        return self.first.shape[1] * self.branches ** len(self.rho)

    def sample(self, key: Array, examples: int) -> Examples:
        """Independent examples, all classes equally likely; `examples` is static under jit."""
        return _sampled(
            self.branches, examples, key, jnp.asarray(self.first, jnp.float32), jnp.array(self.rho)
        )

    def sequences(self, key: Array, examples: Examples, shuffled: bool = False) -> Array:
        """The tokens that are there, int32[E, T] with T the number of leaves: ascending, or in an
        order of chance, behind padding, which is the id T."""
        present = examples.nodes[0]
        place = jnp.broadcast_to(jnp.arange(self.tokens, dtype=jnp.float32), present.shape)
        if shuffled:
            place = jax.random.uniform(key, present.shape)
        order = jnp.argsort(jnp.where(present, place, -1.0), axis=1)
        there = jnp.take_along_axis(present, order, axis=1)
        return jnp.where(there, order, self.tokens).astype(jnp.int32)

    def ancestor_height(self, one: int, other: int) -> int:
        """The level of the lowest common ancestor of two leaves; L if it is the root."""
        height = 0
        while one != other and height < len(self.rho):
            one, other, height = one // self.branches, other // self.branches, height + 1
        return height if one == other else self.levels

    def co_occurrence(self, one: int, other: int) -> float:
        """P[token `one` is there | token `other` is there], exact.

        With one rho and the ancestor at height H < L it is
        (1 + rho^2H - 2 rho^(L-1) rho_0) / (1 - rho^(L-1) rho_0) / 2, rho_0 the mean of 1 - 2 p.
        """
        for name, leaf in (("one", one), ("other", other)):
            whole(name, leaf, 0, self.tokens - 1)
        below = self.branches ** len(self.rho)
        spins = 2 * self.first[:, [one // below, other // below]] - 1  # E[s | class], [C, 2]
        whole_path = float(np.prod(self.rho))
        means = whole_path * spins.mean(axis=0)
        height = self.ancestor_height(one, other)
        if height == self.levels:
            both = whole_path**2 * float(spins.prod(axis=1).mean())
        else:
            both = float(np.prod(np.square(self.rho[:height])))
        return float((1 + means.sum() + both) / 4 / ((1 + means[1]) / 2))


@partial(jax.jit, static_argnums=(0, 1))
def _sampled(branches: int, examples: int, key: Array, first: Array, rho: Array) -> Examples:
    keys = jax.random.split(key, 2 + len(rho))
    label = jax.random.randint(keys[0], (examples,), 0, len(first))
    nodes = [jax.random.uniform(keys[1], (examples, first.shape[1])) < first[label]]
    for level in reversed(range(len(rho))):
        copied = jnp.repeat(nodes[0], branches, axis=1)
        flips = jax.random.bernoulli(keys[2 + level], (1 - rho[level]) / 2, copied.shape)
        nodes.insert(0, copied ^ flips)
    return Examples(label, tuple(nodes))


def latent_tree(
    levels: int = 4, *, classes: int = 5, branches: int = 2, width: int = 2,
    rho: float | Numbers = 0.9, first: Numbers | None = None, seed: int = 0,
) -> LatentTree:  # fmt: skip
    """A tree with `width` nodes below the root and `width * branches^(levels - 1)` tokens.

    Args:
        levels: L, the level of the root; 2 at least.
        classes: values of the root.
        branches: children of every binary node.
        width: binary nodes below the root.
        rho: correlation of child and parent, in [-1, 1], one number or one for each of the L - 1
            levels of edges, those of the leaves first.
        first: P[node below the root is 1 | class], [classes, width]; by default random.
        seed: of that default.

    Raises:
        ValueError: for arguments that do not fit, or more than a million tokens.

    Example:
      >>> tree = latent_tree(4, rho=0.9, first=[[0.21, 0.5]])
      >>> [round(tree.co_occurrence(0, other), 4) for other in (1, 2, 4)]
      [0.8354, 0.7021, 0.5941]
    """
    levels, classes = whole("levels", levels, 2, 64), whole("classes", classes)
    branches, width = whole("branches", branches), whole("width", width)
    if width * branches ** (levels - 1) > MOST_LEAVES:
        raise ValueError(
            f"a tree of {width} x {branches}^{levels - 1} tokens is too large, the most are "
            f"{MOST_LEAVES}; lower levels, branches or width"
        )
    edges = finite_array("rho", rho)
    if edges.shape not in ((), (levels - 1,)) or (np.abs(edges) > 1).any():
        raise ValueError(
            f"rho must be in [-1, 1], one number or {levels - 1} of them (a level of edges each), "
            f"got {edges.tolist()}"
        )
    if first is None:
        chances = np.random.default_rng(seed).uniform(0.05, 0.95, (classes, width))
    else:
        chances = finite_array("first", first)
        if chances.ndim != 2 or not chances.size or (chances < 0).any() or (chances > 1).any():
            raise ValueError("first must be probabilities [classes, nodes below the root]")
    return LatentTree(branches, tuple(np.broadcast_to(edges, (levels - 1,)).tolist()), chances)
