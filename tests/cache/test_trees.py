"""Trees of fresh tokens: a root-to-leaf path equals a chain, its commit equals linear history."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.context import StepContext
from tests.cache.stepping import Stepper, close
from tests.factories import random_tokens
from tests.policies import settings

PARENT = np.array([-1, 0, 0, 1, 1, 2, 5, 6])
PATHS = ((0, 1, 3), (0, 1, 4), (0, 2, 5, 6, 7))
HISTORY, ROWS = 17, 3
CASES = settings(("hard",))


def ancestors_or_self() -> np.ndarray:
    visible = np.eye(len(PARENT), dtype=bool)
    for node, parent in enumerate(PARENT):
        if parent >= 0:
            visible[node] |= visible[parent]
    return visible


def tree_context(length) -> StepContext:
    visible = ancestors_or_self()
    shape = (length.shape[0], len(PARENT))
    return StepContext(
        length=length,
        offset=jnp.broadcast_to(jnp.asarray(visible.sum(axis=1) - 1, jnp.int32), shape),
        valid=jnp.ones(shape, bool),
        visible=jnp.asarray(visible)[None],
        parent=jnp.asarray(PARENT, jnp.int32)[None],
        is_tree=True,
    )


def with_history(model, policy):
    """A stepper, and a cache of three rows with HISTORY, HISTORY - 4 and HISTORY - 6 tokens."""
    stepper = Stepper(model, policy)
    cache = stepper.cache(ROWS)
    for first, count in ((0, [8, 8, 8]), (8, [8, 5, 3]), (16, [1, 0, 0])):
        cache, _ = stepper.step(cache, random_tokens(ROWS, 24)[:, first : first + 8], count)
    assert cache.length.tolist() == [HISTORY, HISTORY - 4, HISTORY - 6]
    return stepper, cache


@pytest.mark.parametrize("model, policy", CASES)
def test_every_path_of_a_tree_equals_the_same_tokens_as_a_chain(model, policy):
    stepper, cache = with_history(model, policy)
    nodes = random_tokens(ROWS, len(PARENT), seed=5)
    logits, _ = stepper.read(cache, nodes, tree_context(cache.length))
    for path in PATHS:
        _, linear = stepper.step(cache, nodes[:, list(path)])
        np.testing.assert_allclose(logits[:, list(path)], linear, **close())


@pytest.mark.parametrize("model, policy", CASES)
def test_a_ragged_commit_of_paths_continues_like_linear_history(model, policy):
    stepper, cache = with_history(model, policy)
    if not policy.lossless_under_tree:
        pytest.skip(f"{policy.name} declares that committing several tokens at once is not exact")
    nodes = random_tokens(ROWS, len(PARENT), seed=5)
    paths = [PATHS[0], PATHS[2], PATHS[1]]
    horizon = policy.horizon(cache.length)
    counts = [len(path) for path in paths]
    if horizon is not None:
        counts = [min(c, int(h)) for c, h in zip(counts, horizon, strict=True)]
    take = np.zeros((ROWS, 5), np.int32)  # entries behind the count are ignored
    for row, path in enumerate(paths):
        take[row, : counts[row]] = path[: counts[row]]
    logits, fresh = stepper.read(cache, nodes, tree_context(cache.length))
    drawn = jnp.argmax(logits[:, 0], axis=-1)
    after = stepper.commit(cache, fresh, jnp.asarray(take), jnp.asarray(counts, jnp.int32), drawn)
    linear = cache
    for i in range(max(counts)):
        tokens = [[nodes[row, take[row, i]]] for row in range(ROWS)]
        linear, _ = stepper.step(linear, tokens, [int(i < count) for count in counts])
    np.testing.assert_array_equal(after.length, linear.length)
    following = random_tokens(ROWS, 6, seed=6)
    _, expected = stepper.step(linear, following)
    _, found = stepper.step(after, following)
    np.testing.assert_allclose(found, expected, **close())


@pytest.mark.parametrize("model, policy", CASES)
def test_a_rejected_tree_leaves_no_trace(model, policy):
    stepper, cache = with_history(model, policy)
    logits, fresh = stepper.read(
        cache, random_tokens(ROWS, len(PARENT), seed=5), tree_context(cache.length)
    )
    after = stepper.commit(
        cache, fresh, jnp.zeros((ROWS, 5), jnp.int32), jnp.zeros((ROWS,), jnp.int32), logits
    )
    jax.tree.map(np.testing.assert_array_equal, after, cache)
