"""What a policy promises about chains of tokens: budgets, chunks, rows, bytes, growth.

Every check takes the policy and a model, a name of `jaxinfer.testing.CONFIGS` or an `LM`, and
raises an AssertionError that names the promise.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxinfer.cache.base import Geometry, bytes_of
from jaxinfer.cache.policy import Policy
from jaxinfer.lm import LM
from jaxinfer.models.stack import cache_bytes_per_row, cache_geometry, grow_cache
from jaxinfer.testing.compare import assert_close, assert_same, row_of
from jaxinfer.testing.models import random_tokens
from jaxinfer.testing.stepper import Stepper

LENGTH = 24
SPLITS: dict[str, tuple[int, ...]] = {
    "one token at a time": (1,) * LENGTH,
    "full chunks": (8, 8, 8),
    "odd chunks": (5, 8, 1, 1, 7, 2),
}


def check_full_budget(
    easy: Policy,
    model: str | LM = "llama",
    sizes: Sequence[int] = SPLITS["odd chunks"],
    *,
    dtype: str = "float32",
    platform: str = "cpu",
) -> None:
    """A budget that loses nothing within 24 tokens equals the forward pass without a cache, whether
    the first chunk is a prompt or not."""
    stepper, tokens = Stepper(model, easy, dtype, platform), random_tokens(1, LENGTH)
    what = f"{easy.name} at full budget differs from attention to all tokens"
    for prompt in (False, True):
        first, rest = tokens[:, : sizes[0]], tokens[:, sizes[0] :]
        cache, start = stepper.step(stepper.cache(), first, is_prompt=prompt)
        _, end = stepper.run(cache, rest, sizes[1:])
        logits = np.concatenate([start, end], axis=1)
        assert_close(logits, stepper.plain(tokens), what, dtype)


def check_chunks(
    policy: Policy, model: str | LM = "llama", sizes: Sequence[int] = SPLITS["odd chunks"]
) -> None:
    """Where `chunk_invariant` is declared, chunks of any size equal token by token."""
    if not policy.chunk_invariant:
        return
    stepper, tokens = Stepper(model, policy), random_tokens(1, LENGTH)
    what = f"{policy.name} declares chunk_invariant, but chunks differ from single tokens"
    for prompt in (False, True):
        cache, logits = stepper.run(stepper.cache(), tokens, sizes, is_prompt=prompt)
        singly = stepper.run(stepper.cache(), tokens, (1,) * LENGTH, is_prompt=prompt)
        assert_close(logits, singly[1], what)
        assert_same(cache.length, singly[0].length, what)


def check_ragged_rows(policy: Policy, model: str | LM = "llama") -> None:
    """Rows of several lengths, read side by side, equal every row alone; the first step is a
    prompt."""
    stepper, tokens = Stepper(model, policy), random_tokens(3, 16, seed=1)
    counts = np.array([[8, 3, 0], [5, 8, 1]])  # two steps of three rows
    cache = stepper.cache(3)
    found: list[list[np.ndarray]] = [[], [], []]
    for number, count in enumerate(counts):
        done = np.asarray(cache.length)
        piece = np.stack([np.take(tokens[b], range(done[b], done[b] + 8)) for b in range(3)])
        cache, logits = stepper.step(cache, piece, count, is_prompt=number == 0)
        for b in range(3):
            found[b].append(logits[b, : count[b]])
    for b in range(3):
        alone, expected, first = stepper.cache(), [], 0
        for number, count in enumerate(counts[:, b]):
            if count:
                piece = tokens[b : b + 1, first : first + count]
                alone, logits = stepper.step(alone, piece, is_prompt=number == 0)
                expected.append(logits[0])
            first += count
        what = f"{policy.name}: row {b} of three differs from the same row alone"
        assert_close(np.concatenate(found[b]), np.concatenate(expected), what)
        assert int(cache.length[b]) == int(alone.length[0]) == counts[:, b].sum(), what


def check_idle_rows(policy: Policy, model: str | LM = "llama") -> None:
    """Padded queries stay finite, and a row that commits nothing keeps its state in every bit."""
    stepper = Stepper(model, policy)
    cache = stepper.cache(3)
    for number, count in enumerate(([8, 3, 0], [0, 0, 0], [8, 8, 1])):
        cache, logits = stepper.step(cache, random_tokens(3, 8), count, is_prompt=number == 0)
        assert np.isfinite(logits).all(), f"{policy.name}: a padded query is not finite"
    before, _ = stepper.step(stepper.cache(3), random_tokens(3, 8), is_prompt=True)
    for prompt in (False, True):
        tokens = random_tokens(3, 8, seed=1)
        after, _ = stepper.step(before, tokens, [8, 0, 3], is_prompt=prompt)
        what = f"{policy.name}: a row that commits nothing has another state"
        assert_same(row_of(after.layers, 1), row_of(before.layers, 1), what)
        assert after.length.tolist() == [16, 8, 11], what


def check_bytes(
    policy: Policy,
    bytes_per_row: Callable[[Policy, Geometry], int] | None = None,
    model: str | LM = "llama",
    *,
    dtype: str = "float32",
    platform: str = "cpu",
) -> None:
    """The allocated bytes are those that the tiers declare, and those of the documented formula
    `bytes_per_row(policy, geometry)` of one row and layer, if one is given."""
    stepper = Stepper(model, policy, dtype, platform)
    cache = stepper.cache(batch=3, capacity=96)
    geometry = cache_geometry(stepper.cfg, 96, dtype, stepper.backend)
    allocated = bytes_of(cache.layers)
    declared = 3 * cache_bytes_per_row(stepper.cfg, policy, geometry, stepper.params)
    assert allocated == declared, (
        f"{policy.name} allocates {allocated} bytes and declares {declared}"
    )
    if bytes_per_row is not None:
        documented = 3 * stepper.cfg.num_layers * bytes_per_row(policy, geometry)
        assert allocated == documented, (
            f"{policy.name} allocates {allocated} bytes, its formula says {documented}"
        )


def check_growth(policy: Policy, model: str | LM = "llama") -> None:
    """A cache that grows keeps what it stores, and one that need not grow stays as it is."""
    stepper, tokens = Stepper(model, policy), random_tokens(1, LENGTH)
    cache, _ = stepper.run(stepper.cache(), tokens[:, :13], (8, 5), is_prompt=True)
    _, expected = stepper.step(cache, tokens[:, 13:21])
    grown, logits = stepper.step(grow_cache(stepper.cfg, cache, 128), tokens[:, 13:21])
    assert_close(logits, expected, f"{policy.name} forgets when its cache grows")
    assert grown.length.tolist() == [21]
    assert_same(grow_cache(stepper.cfg, cache, 16), cache, f"{policy.name} shrinks")
