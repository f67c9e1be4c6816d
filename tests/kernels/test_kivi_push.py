"""One token into a quantized cache: the same bits as the library's, written in place."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.kivi import Kivi
from jaxinfer.runtime.backend import Backend
from pallas_kernels.kivi_push import kivi_push
from pallas_kernels.kivi_push.configs import Config, candidates
from tests.cache.pushing import pushing
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda
from tests.kernels.test_kivi_attention import array, halves, packed_half

BATCH = 8
BACKEND = Backend(layout="BKSH", block=None)  # the layout of a GPU, computed by XLA
DTYPES = ("float32", "bfloat16", "float16")


def tier_of(rng) -> tuple[Kivi, Geometry]:
    """Settings that the kernel knows, with room for three blocks and some tokens."""
    width, group = int(rng.choice([32, 64, 128])), int(rng.choice([16, 32, 64, 128]))
    tier = Kivi(
        key_bits=int(rng.choice([2, 4, 8])),
        value_bits=int(rng.choice([2, 4, 8])),
        key_group=group,
        value_group=int(rng.choice([size for size in (16, 32, 64, 128) if size <= width])),
        residual=group * int(rng.integers(1, 4 if group < 64 else 2)),
        value_flush=str(rng.choice(["sliding", "block"])),
        scale_dtype=str(rng.choice(DTYPES)),
    )
    geometry = Geometry(
        num_kv_heads=int(rng.integers(1, 4)), head_dim=width, dtype=str(rng.choice(DTYPES)),
        capacity=3 * tier.residual + int(rng.integers(tier.residual)),
        backend=BACKEND,
    )  # fmt: skip
    return tier, geometry


def problem(seed: int):
    """A tier, its state of random numbers, and a token for each row."""
    rng = np.random.default_rng(seed)
    tier, geometry = tier_of(rng)
    r, lead, width = tier.residual, (BATCH, geometry.num_kv_heads), geometry.head_dim
    state = tier.init(geometry, BATCH)
    # three that complete a block, an empty cache, one that fills up, two without room
    ends = [r - 1, 2 * r - 1, 3 * r - 1, 0, geometry.capacity - 1, 4 * r - 1, 9 * r]
    stored = rng.permutation([*ends, *rng.integers(0, 3 * r, BATCH - len(ends))])
    count = rng.random(BATCH) < 0.8
    sizes = rng.choice([1e-9, 1.0, 1e4], lead)[..., None, None]

    def half(packed, bits: int, group: int, axis: int):
        shape = (*lead, packed.tokens, width)
        return packed.of(packed_half(rng, shape, bits, group, axis, tier.scale_dtype)[0])

    def tokens(slots: int):
        x = sizes * rng.normal(size=(*lead, slots, width))
        x[:, :, : slots // 2, : width // 2] = 0.5  # groups without spread
        return jnp.asarray(x, state.tail.v.dtype)

    state = replace(
        state,
        keys=half(state.keys, tier.key_bits, tier.key_group, 2),
        values=half(state.values, tier.value_bits, tier.value_group, 3),
        tail=replace(state.tail, k=tokens(r), v=tokens(r)),
    )
    takes = jnp.asarray(count)[:, None, None, None]  # what a row does not take is not read
    fresh = [jnp.where(takes, tokens(1), jnp.nan) for _ in range(2)]
    return tier, state, (*fresh, jnp.asarray(stored, jnp.int32), jnp.asarray(count, jnp.int32))


def spec_of(tier: Kivi) -> dict:
    return {
        "key_bits": tier.key_bits, "value_bits": tier.value_bits, "flush": tier.value_flush
    }  # fmt: skip


def arrays_of(state) -> tuple:
    return state.keys.half, state.values.half, state.tail.k, state.tail.v


@functools.partial(jax.jit, static_argnums=0)
def pushed(tier: Kivi, state, k, v, stored, count):
    """What the library does without a kernel."""
    items = Items(k=k, v=v, pos=stored[:, None, None])
    return tier.push(state, None, items, pushing(stored, count, count))[0]


QUICK = range(4)


def slow(*seeds: int) -> list:
    return [pytest.param(seed, marks=pytest.mark.slow) for seed in range(*seeds)]


@pytest.mark.parametrize("seed", [*QUICK, *slow(4, 44)])
def test_the_kernel_writes_the_bits_of_its_reference(seed):
    tier, state, new = problem(seed)
    config = Config(warps=1) if seed % 2 else None
    run = functools.partial(kivi_push, config=config, **spec_of(tier))
    agree(run, *arrays_of(state), *new, tolerance=0.0)


@pytest.mark.parametrize("seed", [*QUICK, *slow(4, 16)])
def test_the_reference_writes_the_bits_of_the_library(seed):
    tier, state, new = problem(seed)
    run = jax.jit(functools.partial(kivi_push, implementation="reference", **spec_of(tier)))
    found, wanted = run(*arrays_of(state), *new), arrays_of(pushed(tier, state, *new))
    before = jax.tree.leaves(arrays_of(state))
    assert not all(map(np.array_equal, before, jax.tree.leaves(wanted)))
    jax.tree.map(np.testing.assert_array_equal, tuple(found), wanted)


@pytest.mark.parametrize("flush", ["sliding", "block"])
def test_a_cache_that_it_fills_is_the_librarys(flush):
    tier = Kivi(key_group=16, value_group=32, residual=16, value_flush=flush)
    geometry = Geometry(
        num_kv_heads=2, head_dim=32, capacity=56, dtype="bfloat16", backend=BACKEND
    )  # fmt: skip
    wanted = tier.init(geometry, 2)
    given = arrays_of(wanted)
    run = jax.jit(functools.partial(kivi_push, implementation="interpret", **spec_of(tier)))
    stored, rng = jnp.zeros(2, jnp.int32), np.random.default_rng(0)
    for step in range(60):  # beyond what there is room for
        k, v = jnp.asarray(rng.normal(size=(2, 2, 2, 1, 32)), "bfloat16")
        count = jnp.array([1, step % 3 > 0], jnp.int32)
        given = tuple(run(*given, k, v, stored, count))
        wanted, stored = pushed(tier, wanted, k, v, stored, count), stored + count
        jax.tree.map(np.testing.assert_array_equal, given, arrays_of(wanted))
    assert all(leaf.any() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize(
    "flush, dtype", [("sliding", "bfloat16"), ("block", "bfloat16"), ("sliding", "float32")]
)
def test_it_compiles_for_an_h200_in_place(flush, dtype):
    b, k, r, h = 8, 8, 128, 128
    keys, values = halves(b, k, 8192, h, 2)
    if dtype == "float32":  # the largest groups, too
        scales = array(b, k, 8192 // 128, h, dtype="float16"), array(b, k, 8192, 1, dtype="float16")
        keys, values = (
            half._replace(scale=scale, zero=scale)
            for half, scale in zip((keys, values), scales, strict=True)
        )
    tail, new, rows = array(b, k, r, h, dtype=dtype), array(b, k, 1, h, dtype=dtype), (b,)
    rest = new, new, array(*rows, dtype="int32"), array(*rows, dtype="int32")
    step = functools.partial(kivi_push, key_bits=2, value_bits=2, flush=flush)
    lowers_for_cuda(step, keys, values, tail, tail, *rest)

    def donating(cache, rest):
        return step(*cache, *rest)

    cache = keys, values, tail, tail
    compiled = compiles_without_spills(donating, cache, rest, donate_argnames=("cache",))
    held = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    assert compiled.memory_analysis().temp_size_in_bytes == 0


def test_the_default_is_the_first_candidate():
    assert candidates()[0] == Config() and len(candidates()) <= 24


def test_bad_arguments_are_refused():
    tier = Kivi(key_group=32, residual=32, value_flush="block")
    geometry = Geometry(num_kv_heads=2, head_dim=32, capacity=96, backend=BACKEND)
    keys, values, tail, _ = arrays_of(tier.init(geometry, 3))
    new, rows = jnp.zeros((3, 2, 1, 32)), jnp.zeros(3, jnp.int32)

    def refused(message, tail=tail, v=new, stored=rows, **changes):
        with pytest.raises(ValueError, match=message):
            kivi_push(
                keys, values, tail, tail, new, v, stored, rows, **spec_of(tier) | changes
            )  # fmt: skip

    refused("v must be float32, as tail_v is, got bfloat16", v=new.astype("bfloat16"))
    refused(r"stored must have shape \[3\], got \[2\]", stored=rows[:2])
    refused("flush must be 'sliding' or 'block', got 'window'", flush="window")
    refused("keys have 2, 4 or 8 bits, got 3", key_bits=3)
    refused("must have a multiple of 32 slots, got 16", tail=tail[:, :, :16])
    refused("keys must have room for blocks of 64, got 96", tail=jnp.zeros((3, 2, 64, 32)))
