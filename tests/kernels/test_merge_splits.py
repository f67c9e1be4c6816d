"""The merge of an attention kernel's splits: plain `jnp`, interpret mode, CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention_tile import merged
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dense_attention.configs import Config
from pallas_kernels.dispatch import dispatch
from pallas_kernels.merge_splits import merge_splits
from tests.kernels.checking import NEGATIVE, agree, compiles_without_spills, lowers_for_cuda


def run(acc, peak, norm, implementation=None):
    return dispatch(implementation, merged, merge_splits, acc, peak, norm)


def splits_of(seed: int, *shape: int):
    """What splits [B, K, P, R] with values of some width may have written; some saw no key."""
    rng = np.random.default_rng(seed)
    empty = rng.random(shape[:-1]) < rng.choice([0.0, 0.3, 1.0])
    acc = np.where(empty[..., None], 0, rng.normal(size=shape))
    peak = np.where(empty, NEGATIVE, 10 * rng.normal(size=shape[:-1]))
    norm = np.where(empty, 0, rng.uniform(1, 50, shape[:-1]))
    return tuple(jnp.asarray(x, jnp.float32) for x in (acc, peak, norm))


SIZES = [
    pytest.param((2, 3, 5, 3, 24), id="odd sizes"),
    pytest.param((1, 2, 70, 1, 128), id="several tiles of splits"),
    pytest.param((1, 1, 2, 9, 64), id="two splits"),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_agrees_with_plain_jnp(size, seed):
    agree(run, *splits_of(seed, *size))


def test_splits_that_saw_nothing_change_nothing():
    acc, peak, norm = splits_of(1, 1, 2, 3, 4, 16)
    lone = tuple(x.at[:, :, 1:].set(y) for x, y in ((acc, 0), (peak, NEGATIVE), (norm, 0)))
    for found, given in zip(run(*lone, implementation="interpret"), lone, strict=True):
        np.testing.assert_array_equal(found, given[:, :, 0])


@pytest.mark.parametrize("splits, calls", [(1, 1), (4, 2)])
def test_it_is_launched_for_more_than_one_split(splits, calls):
    q, cache = jnp.zeros((1, 2, 3, 1, 16)), jnp.zeros((1, 2, 256, 16))
    config = Config(rows=16, keys=16, splits=splits)
    attention = functools.partial(dense_attention, scale=0.1, config=config)
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
    lowers_for_cuda(run, *args)
    compiles_without_spills(run, *args)
