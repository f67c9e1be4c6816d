"""What a policy promises about trees of fresh tokens: a path equals a chain, its commit equals
linear history, and a rejected tree leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.lm import LM
from jaxinfer.speculative.step import tree_context
from jaxinfer.speculative.topology import Topology
from jaxinfer.testing.compare import assert_close, assert_same
from jaxinfer.testing.models import random_tokens
from jaxinfer.testing.stepper import Stepper

TREE = Topology((-1, 0, 0, 1, 1, 2, 5, 6))
PATHS = ((0, 1, 3), (0, 1, 4), (0, 2, 5, 6, 7))
HISTORY, ROWS = 17, 3


def with_history(policy: Policy, model: str | LM) -> tuple[Stepper, Cache]:
    """A cache of three rows with HISTORY, HISTORY - 4 and HISTORY - 6 tokens, of which the first
    eight are a prompt."""
    stepper = Stepper(model, policy)
    cache, tokens = stepper.cache(ROWS), random_tokens(ROWS, 24)
    for first, count in ((0, [8, 8, 8]), (8, [8, 5, 3]), (16, [1, 0, 0])):
        piece = tokens[:, first : first + 8]
        cache, _ = stepper.step(cache, piece, count, is_prompt=first == 0)
    return stepper, cache


def check_tree_paths(policy: Policy, model: str | LM = "llama") -> None:
    """Every path of a tree equals the same tokens as a chain."""
    stepper, cache = with_history(policy, model)
    nodes = random_tokens(ROWS, TREE.nodes, seed=5)
    logits, _ = stepper.read(cache, nodes, tree_context(TREE, cache.length))
    for path in PATHS:
        _, linear = stepper.step(cache, nodes[:, list(path)])
        what = f"{policy.name}: the path {path} of a tree differs from a chain of its tokens"
        assert_close(logits[:, list(path)], linear, what)


def check_tree_commit(policy: Policy, model: str | LM = "llama") -> None:
    """Where `lossless_under_tree` is declared, committing a path of a tree at once continues like
    committing its tokens one by one, within the policy's `horizon`."""
    if not policy.lossless_under_tree:
        return
    stepper, cache = with_history(policy, model)
    nodes = random_tokens(ROWS, TREE.nodes, seed=5)
    paths = [PATHS[0], PATHS[2], PATHS[1]]
    horizon = policy.horizon(cache.length)
    counts = [len(path) for path in paths]
    if horizon is not None:
        counts = [min(c, int(h)) for c, h in zip(counts, horizon, strict=True)]
    accepted = np.zeros((ROWS, 5), np.int32)  # entries behind the count are ignored
    for row, path in enumerate(paths):
        accepted[row, : counts[row]] = path[: counts[row]]
    logits, fresh = stepper.read(cache, nodes, tree_context(TREE, cache.length))
    drawn = jnp.argmax(logits[:, 0], axis=-1)
    count = jnp.asarray(counts, jnp.int32)
    after = stepper.commit(cache, fresh, jnp.asarray(accepted), count, drawn)
    linear = cache
    for i in range(max(counts)):
        tokens = [[nodes[row, accepted[row, i]]] for row in range(ROWS)]
        linear, _ = stepper.step(linear, tokens, [int(i < count) for count in counts])
    what = (
        f"{policy.name} declares lossless_under_tree, but committing {counts} tokens at once "
        "differs from committing them one by one"
    )
    assert_same(after.length, linear.length, what)
    following = random_tokens(ROWS, 6, seed=6)
    assert_close(stepper.step(after, following)[1], stepper.step(linear, following)[1], what)


def check_rejected_tree(policy: Policy, model: str | LM = "llama") -> None:
    """A tree of which nothing is accepted leaves the cache as it was, in every bit."""
    stepper, cache = with_history(policy, model)
    nodes = random_tokens(ROWS, TREE.nodes, seed=5)
    logits, fresh = stepper.read(cache, nodes, tree_context(TREE, cache.length))
    none = jnp.zeros((ROWS, 5), jnp.int32), jnp.zeros((ROWS,), jnp.int32)
    after = stepper.commit(cache, fresh, *none, logits)
    same = jax.tree.structure(after) == jax.tree.structure(cache)
    assert same, f"{policy.name}: a rejected tree changes the kind of the cache"
    assert_same(after, cache, f"{policy.name}: a rejected tree leaves a trace in the cache")
