"""Tokens written into slots and taken out of them: what a loop does, in one launch and in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.put_tokens import put_tokens, swap_tokens
from pallas_kernels.put_tokens.configs import Config
from tests.combinations import diagonal
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda

FLOATS = ["float32", "bfloat16", "float16"]


def problem(seed: int):
    """Slots and tokens of any dtypes, some beyond float16's range, with or without weights and
    positions; of the indices about a third are no slot."""
    rng = np.random.default_rng(seed)
    b, k, h = (
        int(rng.integers(1, 4)),
        int(rng.integers(1, 4)),
        int(rng.choice([32, 48, 64, 80, 128])),
    )
    tokens = [1, int(rng.integers(2, 9)), int(rng.integers(9, 71))][rng.integers(3)]
    slots = int(rng.integers(1, 100))
    of_stored, of_tokens = rng.choice(FLOATS, 2)
    heads = {"k": k, "v": k}
    if rng.random() < 0.6:
        heads |= {"attn_weight": k, "pos": int(rng.choice([1, k]))}

    def some(name, *shape, dtype):
        if name == "pos":
            return jnp.asarray(rng.integers(0, 999, shape), jnp.int32)
        large = 1e3 if dtype == "float16" else 1e5
        x = rng.normal(size=shape) * np.where(rng.random(shape) < 0.1, large, 1)
        return jnp.asarray(x, "float32" if name == "attn_weight" else dtype)

    def width(name):
        return (h,) if name in "kv" else ()

    stored = {name: some(name, b, k, slots, *width(name), dtype=of_stored) for name in heads}
    fresh = {
        name: some(name, b, of, tokens, *width(name), dtype=of_tokens) for name, of in heads.items()
    }
    of_index = (b, k) if rng.random() < 0.5 else (b,)
    nowhere = rng.choice([-5, -1, slots, slots + 3], tokens)
    index = [
        rng.permutation([*rng.permutation(slots)[:tokens], *nowhere])[:tokens]
        for _ in range(int(np.prod(of_index)))
    ]
    index = jnp.asarray(np.reshape(index, (*of_index, tokens)), jnp.int32)
    config = [None, Config(tokens=1, warps=1), Config(tokens=32, warps=2)][rng.integers(3)]
    return (stored, fresh, index), config


QUICK, ALL = range(4), [pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 44)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
@pytest.mark.parametrize("run", [put_tokens, swap_tokens])
def test_the_kernel_writes_the_bits_of_its_reference(run, seed):
    args, config = problem(seed)
    agree(functools.partial(run, config=config), *args, tolerance=0.0)


def looped(stored, fresh, index):
    """The slots after, and what is not kept, token by token in NumPy."""
    new = {name: np.array(x) for name, x in stored.items()}
    left = {}
    for name, x in fresh.items():
        batch, heads, slots = stored[name].shape[:3]
        x = np.broadcast_to(x, (batch, heads, *x.shape[2:]))
        gone = np.array(x, np.promote_types(new[name].dtype, x.dtype))
        for b, head, a in np.ndindex(batch, heads, index.shape[-1]):
            slot = index[b, a] if index.ndim == 2 else index[b, head, a]
            if 0 <= slot < slots:
                gone[b, head, a] = stored[name][b, head, slot]
                one = x[b, head, a]
                if new[name].dtype == np.float16:
                    one = np.clip(one.astype(np.float32), -65504, 65504)
                new[name][b, head, slot] = one
        left[name] = gone
    return new, left


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("seed", range(6))
def test_it_does_what_a_loop_over_tokens_does(seed, implementation):
    args, _ = problem(seed)
    new, left = looped(*(jax.tree.map(np.asarray, x) for x in args))
    put = jax.jit(functools.partial(put_tokens, implementation=implementation))(*args)
    swapped = jax.jit(functools.partial(swap_tokens, implementation=implementation))(*args)
    for found, wanted in ((put, new), (swapped[0], new), (swapped[1], left)):
        assert set(found) == set(wanted)
        for name, x in found.items():
            assert x.dtype == wanted[name].dtype
            np.testing.assert_array_equal(np.asarray(x), wanted[name], err_msg=name)


def test_what_is_no_number_stays_so_in_float16():
    stored = {"k": jnp.zeros((1, 1, 2, 4), jnp.float16)}
    fresh = {"k": jnp.asarray([[[[np.nan, np.inf, -np.inf, 7e4]]]], jnp.bfloat16)}
    for name in ("reference", "interpret"):
        new = put_tokens(stored, fresh, jnp.zeros((1, 1), jnp.int32), implementation=name)
        np.testing.assert_array_equal(new["k"][0, 0, 0], [np.nan, 65504, -65504, 65504])


def shapes(b, k, slots, h, tokens, by_head, dtype="bfloat16"):
    def arrays(n):
        array = jax.ShapeDtypeStruct
        found = {name: array((b, k, n, h), dtype) for name in "kv"}
        if by_head:
            found |= {"attn_weight": array((b, k, n), "float32"), "pos": array((b, k, n), "int32")}
        return found

    index = jax.ShapeDtypeStruct((b, k, tokens) if by_head else (b, tokens), "int32")
    return arrays(slots), arrays(tokens), index


SIZES = [
    pytest.param((8, 32, 4096, 128, 1, False), id="llama-2, one token"),
    pytest.param((8, 32, 4096, 128, 1, True), id="llama-2, h2o"),
    pytest.param((1, 3, 32768, 64, 4096, False), id="smollm2, a prompt"),
    pytest.param((2, 4, 512, 80, 33, True), id="heads of 80"),
    pytest.param((16, 32, 65536, 128, 1, False), id="more than 2**31 numbers"),
]


@pytest.mark.parametrize("sizes, run", diagonal(SIZES, [put_tokens, swap_tokens]))
def test_it_compiles_for_an_h200_in_place(run, sizes):
    args = shapes(*sizes)
    lowers_for_cuda(run, *args)

    def donating(stored, fresh, index):
        return run(stored, fresh, index)

    compiled = compiles_without_spills(donating, *args, donate_argnames=("stored",))
    held = sum(np.prod(x.shape, dtype=np.int64) * x.dtype.itemsize for x in args[0].values())
    assert compiled.memory_analysis().alias_size_in_bytes == held
    assert compiled.memory_analysis().temp_size_in_bytes < held // 100


def test_bad_arguments_are_refused():
    stored, fresh, index = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), part)
        for part in shapes(2, 3, 8, 4, 5, by_head=True)
    )
    cases = [
        (stored, fresh, index[0, 0], "index must be integers"),
        (stored, fresh, index.astype(jnp.float32), "index must be integers .* float32"),
        (stored, fresh, index[:, :2], r"index must have shape \[2, 3, _\]"),
        (stored, {"k": fresh["k"]}, index, "must have the arrays .* got .'k'"),
        (stored, fresh | {"v": fresh["v"][..., :3]}, index, r"tokens\['v'\] must have shape"),
        (
            stored,
            fresh | {"attn_weight": fresh["attn_weight"][:, :2]},
            index,
            r"tokens\['attn_weight'\] must have",
        ),
        (stored | {"v": stored["v"][:, :, :7]}, fresh, index, r"stored\['v'\] must have shape"),
        (stored, fresh, index[..., :4], r"tokens\['\w+'\] must have shape \[2, 3, 4"),
    ]
    for *args, message in cases:
        for run in (put_tokens, swap_tokens):
            with pytest.raises(ValueError, match=message):
                run(*args)
    with pytest.raises(ValueError, match="powers of two, got 3 and 1"):
        Config(tokens=3, warps=1)
