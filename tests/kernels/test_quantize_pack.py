"""The flush: the same bits as the library's, written in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops.quantize import pack, quantize
from pallas_kernels.kivi_attention import PackedHalf
from pallas_kernels.quantize_pack import quantize_pack
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda
from tests.kernels.test_kivi_attention import array, halves


def problem(seed: int):
    rng = np.random.default_rng(seed)
    b, k, h = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice([32, 64]))
    bits = int(rng.choice([2, 4, 8]))
    per_channel = bool(rng.integers(2))
    group = int(rng.choice([16, 32]))
    runs = int(rng.integers(1, 4))
    run = 32 if per_channel else int(rng.choice([1, 4, 32]))
    room = run * 6 if per_channel else max(run * 6, 8)
    axis = 2 if per_channel else 3
    old = jnp.asarray(rng.normal(size=(b, k, room, h)), jnp.float32)
    codes, scale, zero = quantize(old, bits, group, axis)
    half = PackedHalf(pack(codes, bits, axis), scale, zero)
    x = rng.normal(size=(b, k, runs * run, h)) * rng.choice([1e-9, 1.0, 1e4])
    x[:, :, : run // 2] = 0.5  # groups without spread
    x = jnp.asarray(x, rng.choice(["float32", "bfloat16"]))
    places = [rng.permutation(8)[:runs] for _ in range(b)]  # 6 and 7 write nothing
    index = jnp.asarray(np.stack(places), jnp.int32)
    return half, x, index, {"bits": bits, "per_channel": per_channel}, group


QUICK, ALL = range(4), [pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_the_kernel_writes_the_bits_of_its_reference(seed):
    half, x, index, spec, _ = problem(seed)
    agree(functools.partial(quantize_pack, **spec), half, x, index, tolerance=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_writes_the_bits_of_the_library(seed):
    half, x, index, spec, group = problem(seed)
    found = jax.jit(functools.partial(quantize_pack, implementation="reference", **spec))(
        half, x, index
    )
    axis = 2 if spec["per_channel"] else 3
    codes, *metadata = quantize(x, spec["bits"], group, axis)
    new = (pack(codes, spec["bits"], axis), *metadata)
    runs = index.shape[1]
    for old, new_part, written in zip(half, new, found, strict=True):
        expected, entries = np.array(old), new_part.shape[2] // runs
        for b, m in np.ndindex(*index.shape):
            first = int(index[b, m]) * entries
            if first + entries <= old.shape[2]:
                source = new_part[b, :, m * entries : (m + 1) * entries]
                expected[b, :, first : first + entries] = source
        np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("per_channel, run", [(True, 128), (False, 128), (False, 1)])
def test_it_compiles_for_an_h200_in_place(per_channel, run):
    keys, values = halves(8, 8, 8192, 128, 2)
    half = keys if per_channel else values
    args = half, array(8, 8, run, 128), array(8, 1, dtype="int32")
    step = functools.partial(quantize_pack, bits=2, per_channel=per_channel)
    lowers_for_cuda(step, *args)

    def donating(half, x, index):
        return step(half, x, index)

    compiled = compiles_without_spills(donating, *args, donate_argnames=("half",))
    held = sum(np.prod(x.shape) * x.dtype.itemsize for x in half)
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    assert compiled.memory_analysis().temp_size_in_bytes < held // 100


def test_bad_arguments_are_refused():
    half, x, index, spec, _ = problem(0)
    with pytest.raises(ValueError, match=r"index must have shape \[.*, _\], got"):
        quantize_pack(half, x, index[0], **spec)
    with pytest.raises(ValueError, match="runs must be"):
        quantize_pack(half, jnp.zeros((*x.shape[:2], 3, x.shape[3])), index[:, :1], **spec)
