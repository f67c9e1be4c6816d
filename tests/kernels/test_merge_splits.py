"""The merge of an attention kernel's splits: plain `jnp`, interpret mode, CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dense_attention.configs import Config
from pallas_kernels.dispatch import dispatch
from pallas_kernels.merge_splits import attend_splits, merge_splits
from pallas_kernels.softmax_state import ExtraKeys, attended, merged
from tests.kernels.checking import NEGATIVE, agree, compiles_without_spills, lowers_for_cuda


def run(acc, top, total, implementation=None):
    return dispatch(implementation, merged, merge_splits, acc, top, total)


def run_to_the_end(acc, top, total, extra, implementation=None):
    """In bfloat16, as a model's queries are; `extra` as of one query per row."""
    size = acc.shape[0], acc.shape[1], acc.shape[3], 1, acc.shape[4]

    def reference(acc, top, total, extra):
        state = tuple(x.reshape(*size[:4], *x.shape[3:]) for x in merged(acc, top, total))
        return attended(state, extra, jnp.bfloat16)

    def kernel(acc, top, total, extra, *, interpret):
        found = attend_splits(acc, top, total, extra, jnp.bfloat16, interpret=interpret)
        return found.reshape(size)

    return dispatch(implementation, reference, kernel, acc, top, total, extra)


def rest_of(seed: int, size, fresh: int, *, state: bool):
    """Fresh keys, some of them hidden, and perhaps a state, for the rows of such splits."""
    rng = np.random.default_rng(seed)
    b, k, _, r, h = size
    hidden = rng.random((b, k, r, 1, fresh)) < rng.choice([0.0, 0.5])
    scores = np.where(hidden, NEGATIVE, 10 * rng.normal(size=hidden.shape))
    values = jnp.asarray(rng.normal(size=(b, k, fresh, h)), jnp.bfloat16)
    other = tuple(x[:, :, 0] for x in splits_of(seed + 10, *size))
    other = tuple(x.reshape(b, k, r, 1, *x.shape[3:]) for x in other)
    return ExtraKeys(jnp.asarray(scores, jnp.float32), values, other if state else None)


def splits_of(seed: int, *shape: int):
    """What splits [B, K, P, R] with values of some width may have written; some saw no key."""
    rng = np.random.default_rng(seed)
    empty = rng.random(shape[:-1]) < rng.choice([0.0, 0.3, 1.0])
    acc = np.where(empty[..., None], 0, rng.normal(size=shape))
    top = np.where(empty, NEGATIVE, 10 * rng.normal(size=shape[:-1]))
    total = np.where(empty, 0, rng.uniform(1, 50, shape[:-1]))
    return tuple(jnp.asarray(x, jnp.float32) for x in (acc, top, total))


SIZES = [
    pytest.param((2, 3, 5, 3, 24), id="odd sizes"),
    pytest.param((1, 2, 70, 1, 128), id="several tiles of splits"),
    pytest.param((1, 1, 2, 9, 64), id="two splits"),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_agrees_with_plain_jnp(size, seed):
    agree(run, *splits_of(seed, *size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fresh, state", [(1, False), (1, True), (7, False), (70, True)])
def test_with_the_rest_of_the_keys_it_gives_the_output(size, fresh, state):
    extra = rest_of(fresh, size, fresh, state=state)
    agree(run_to_the_end, *splits_of(fresh, *size), extra, tolerance=1e-2)  # of bfloat16


def test_queries_that_saw_nothing_get_zero():
    size = (1, 2, 3, 4, 16)
    acc, top, total = splits_of(1, *size)
    empty = jnp.zeros_like(acc), jnp.full_like(top, NEGATIVE), jnp.zeros_like(total)
    extra = rest_of(1, size, 2, state=False)
    extra = extra._replace(scores=jnp.full_like(extra.scores, NEGATIVE))
    found = run_to_the_end(*empty, extra, implementation="interpret")
    assert not np.asarray(found, np.float32).any()


def test_splits_that_saw_nothing_change_nothing():
    acc, top, total = splits_of(1, 1, 2, 3, 4, 16)
    lone = tuple(x.at[:, :, 1:].set(y) for x, y in ((acc, 0), (top, NEGATIVE), (total, 0)))
    for found, given in zip(run(*lone, implementation="interpret"), lone, strict=True):
        np.testing.assert_array_equal(found, given[:, :, 0])


@pytest.mark.parametrize("splits, ends, calls", [(1, False, 1), (1, True, 2), (4, True, 2)])
def test_it_is_launched_for_more_than_one_split_and_for_the_output(splits, ends, calls):
    q, cache = jnp.zeros((1, 2, 3, 1, 16)), jnp.zeros((1, 2, 256, 16))
    extra = ExtraKeys(jnp.zeros((1, 2, 3, 1, 1)), jnp.zeros((1, 2, 1, 16))) if ends else None
    config = Config(rows=16, keys=16, splits=splits)
    attention = functools.partial(dense_attention, extra=extra, scale=0.1, config=config)
    lowers_for_cuda(attention, q, cache, cache, jnp.ones((1, 1, 1, 256), bool), calls=calls)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((1, 3, 88, 3, 64), id="smollm2"),
        pytest.param((1, 32, 9, 1, 128), id="llama-2"),
        pytest.param((1, 8, 33, 4, 256), id="wide heads"),
        pytest.param((2, 4, 5, 192, 80), id="tree of 64, odd size"),
    ],
)
def test_it_compiles_for_an_h200_without_spills(size):
    shapes = (size, size[:-1], size[:-1])
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    extra = jax.eval_shape(lambda: rest_of(0, size, min(size[3], 64), state=True))
    lowers_for_cuda(run, *args)
    compiles_without_spills(run, *args)
    compiles_without_spills(run_to_the_end, *args, extra)
