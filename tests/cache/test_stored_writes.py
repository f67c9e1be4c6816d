"""What kernels (interpreted) write into a cache is what XLA writes, in the layout of GPUs."""

import functools
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.attend import KeyWeights, commit_layer
from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.cache.presets import full, h2o, kivi, streaming
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.inspection.gpu_target import lower_for_cuda
from jaxinfer.lm import LM
from jaxinfer.models.params import init_params
from jaxinfer.runtime.backend import Backend
from tests.cache.pushing import committing, pushing
from tests.kernels.checking import lowers_for_cuda
from tests.policies import over, with_random_feature_maps

SLOW = pytest.mark.slow
K, H = 2, 32
GEOMETRY = Geometry(
    num_kv_heads=K, head_dim=H, capacity=192, dtype="bfloat16", backend=Backend.of(platform="gpu")
)
BLOCKS = kivi(bits=2, group=16, residual=16, value_flush="block")
FLUSHES = {  # with the launches of a push of several tokens
    "2 bits by blocks": (BLOCKS, 2),
    "4 bits by blocks of 48": (kivi(bits=4, group=16, residual=48, value_flush="block"), 2),
    "bfloat16 scales": (
        kivi(
            key_bits=8,
            value_bits=4,
            group=32,
            residual=32,
            value_flush="block",
            scale_dtype="bfloat16",
        ),
        2,
    ),
    "2 bits, sliding": (kivi(bits=2, group=16, residual=16), 1),  # the tail needs the keys' codes
    "2 bits in a window": (streaming(4, 64, bits=2, group=16, residual=16), 0),  # they are spilled
}
CFG = ModelConfig(
    family="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=16, max_positions=512, rope=RopeConfig(rotary_dim=16),
)  # fmt: skip
PROMPTS = [list(range(3, 40)), [7, 1, 8], list(range(30, 9, -1))]


def tier_of(policy):
    return next(tier for tier in policy.tiers if hasattr(tier, "value_flush"))


def items(tokens: int, seed: int, batch: int = 2) -> Items:
    k, v = jax.random.normal(jax.random.key(seed), (2, batch, K, tokens, H), jnp.bfloat16)
    return Items(k=k, v=v, pos=jnp.zeros((batch, 1, tokens), jnp.int32))


def geometry_of(implementation, **changes) -> Geometry:
    return replace(GEOMETRY, backend=Backend.of(implementation, "gpu"), **changes)


def states(policy, implementation) -> list:
    """The tier's state after a ragged prompt and after each of 50 single tokens."""
    tier = tier_of(policy)

    @jax.jit
    def push(state, items, n_in, count):
        return tier.push(state, None, items, pushing(n_in, count, n_in))[0]

    state = tier.init(geometry_of(implementation), 2)
    found, n_in = [], jnp.zeros(2, jnp.int32)
    pieces = [(items(70, 0), jnp.array([70, 41]))]
    pieces += [(items(1, seed), jnp.array([1, seed % 2])) for seed in range(1, 51)]
    for piece, count in pieces:
        state = push(state, piece, n_in, count.astype(jnp.int32))
        n_in += count.astype(jnp.int32)
        found.append(jax.tree.leaves(state))
    return found


@pytest.mark.parametrize(
    "name",
    [
        "2 bits by blocks",
        "4 bits by blocks of 48",
        pytest.param("bfloat16 scales", marks=SLOW),
        pytest.param("2 bits, sliding", marks=SLOW),
    ],
)
def test_a_cache_written_by_kernels_has_the_bits_of_one_written_by_xla(name):
    policy, _ = FLUSHES[name]
    wanted, given = states(policy, "reference"), states(policy, "interpret")
    assert any(leaf.any() for leaf in wanted[-1] if leaf.dtype == jnp.uint32)
    for a, b in zip(wanted, given, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


DENSE = {  # with the launches of a step: one per tier
    "full": (full(), 1),
    "streaming": (streaming(4, 13), 2),
    "heavy hitters": (h2o(heavy=6, recent=5), 2),
}


def committed(policy, states, items, length, count):
    """The states after a step in which every stored token got some attention weight."""
    if policy.weigh_keys == "always":
        attn_weights = [[jnp.abs(state.k[..., :1].swapaxes(2, 3))] for state in states]
        stored = tuple(
            tuple(x.astype(jnp.float32) for x in attn_weight) for attn_weight in attn_weights
        )
        attn_weight = KeyWeights(
            stored=stored, fresh=jnp.abs(items.k[:, :, None, :, 0]).astype(jnp.float32)
        )
        items = replace(items, attn_weight=attn_weight)
    return commit_layer(policy, states, None, items, committing(length, count, count))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_slots_written_by_a_kernel_have_the_bits_of_those_that_xla_writes(name, dtype):
    policy, _ = DENSE[name]
    found = {}
    for implementation in ("reference", "interpret"):
        geometry = geometry_of(implementation, dtype=dtype)
        states = tuple(tier.init(geometry, 2) for tier in policy.tiers)
        step = jax.jit(functools.partial(committed, policy))
        length, found[implementation] = jnp.zeros(2, jnp.int32), []
        for seed, counts in enumerate([(9, 3), (1, 1), (1, 0), (20, 2), *[(1, 1)] * 12, (3, 1)]):
            fresh, count = items(max(counts), seed), jnp.asarray(counts, jnp.int32)
            states = step(states, fresh, length, count)
            length += count
            found[implementation].append(states)
    jax.tree.map(np.testing.assert_array_equal, *(
        [jax.tree.leaves(states) for states in found[name]] for name in found
    ))  # fmt: skip
    assert found["interpret"][-1][-1].v.any()


@pytest.mark.parametrize("policy, launches", DENSE.values(), ids=DENSE)
def test_a_step_on_a_cuda_device_writes_a_tier_with_one_launch(policy, launches):
    states = tuple(tier.init(GEOMETRY, 2) for tier in policy.tiers)
    zero = jnp.zeros(2, jnp.int32)
    step = functools.partial(committed, policy)
    lowers_for_cuda(step, states, items(1, 0), zero, zero + 1, calls=launches)
    text = lower_for_cuda(step, states, items(1, 0), zero, zero + 1).as_text()
    assert "stablehlo.scatter" not in text


def push_arguments(policy, tokens: int = 1):
    tier = tier_of(policy)
    state, zero = tier.init(GEOMETRY, 2), jnp.zeros(2, jnp.int32)
    return (lambda *args: tier.push(*args[:1], None, args[1], pushing(*args[2:]))), (
        *(state, items(tokens, 0)), zero, zero + 1, zero
    )  # fmt: skip


@pytest.mark.parametrize("policy, calls", FLUSHES.values(), ids=FLUSHES)
def test_a_cuda_device_takes_the_kernel_where_codes_are_only_written(policy, calls):
    push, arguments = push_arguments(policy, tokens=2)
    lowers_for_cuda(push, *arguments, calls=calls)


@pytest.mark.parametrize("policy, calls", FLUSHES.values(), ids=FLUSHES)
def test_a_cuda_device_takes_a_lone_token_in_one_launch(policy, calls):
    push, arguments = push_arguments(policy)
    lowers_for_cuda(push, *arguments, calls=min(calls, 1))
    if calls:
        assert "stablehlo.scatter" not in lower_for_cuda(push, *arguments).as_text()


@pytest.mark.parametrize(
    "change, width",
    [
        ({"key_grouping": "token"}, H),
        ({"value_bits": 16}, H),
        ({"group": 8, "bits": 4}, H),
        ({}, 48),
    ],
)
def test_a_format_without_a_kernel_is_written_by_xla_and_refused_by_name(change, width):
    policy = kivi(**{"bits": 2, "group": 16, "residual": 16, "value_flush": "block"} | change)
    tier = tier_of(policy)

    def push(implementation):
        geometry = geometry_of(implementation, head_dim=width)
        state, zero = tier.init(geometry, 2), jnp.zeros(2, jnp.int32)
        k = jnp.zeros((2, K, 1, width), jnp.bfloat16)
        fresh = Items(k=k, v=k, pos=jnp.zeros((2, 1, 1), jnp.int32))
        return jax.eval_shape(
            lambda state: tier.push(state, None, fresh, pushing(zero, zero + 1, zero))[0], state
        )

    push(None)
    for name in ("interpret", "triton"):
        with pytest.raises(ValueError, match="the kernels write 2-, 4- and 8-bit keys per channel"):
            push(name)


@pytest.mark.parametrize(
    "base", [h2o(heavy=4, recent=6), pytest.param(streaming(sinks=2, window=9), marks=SLOW)]
)
def test_kernels_read_and_update_the_low_rank_state_as_the_reference_does(base):
    policy = with_random_feature_maps(over(base), CFG)
    params = init_params(CFG, jax.random.key(0))
    options = {"max_new_tokens": 12, "policy": policy, "ignore_eos": True}
    wanted = LM(CFG, params).generate(PROMPTS, **options)
    given = LM(CFG, params, implementation="interpret").generate(PROMPTS, **options)
    bare = LM(CFG, params).generate(PROMPTS, **options | {"policy": base})
    for a, b, other in zip(wanted, given, bare, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)
        if len(a.tokens) and other is bare[0]:  # or nothing of the state would have been seen
            assert np.abs(np.subtract(a.log_probs, other.log_probs)).max() > 1e-3


def test_a_cuda_device_updates_the_low_rank_state_with_the_kernel():
    cfg = replace(CFG, head_dim=H)
    aux = with_random_feature_maps(over(h2o(heavy=4, recent=6)), cfg).feature_maps.layers[0]
    tier, zero = LowRank(rank=3), jnp.zeros(2, jnp.int32)

    def push(state, items):
        return tier.push(state, aux, items, pushing(zero, zero + 1, zero))

    lowers_for_cuda(push, tier.init(GEOMETRY, 2), items(1, 0), calls=1)


def test_a_low_rank_state_wider_than_the_kernels_is_refused_by_name():
    wide = replace(GEOMETRY, dtype="float64")
    with jax.enable_x64(True):
        assert LowRank(rank=3).init(wide, 1).backend.implementation == "reference"
        with pytest.raises(ValueError, match="float32, got a cache of float64"):
            LowRank(rank=3).init(geometry_of("interpret", dtype="float64"), 1)


ON_A_CPU = """
import sys
import jax, jax.numpy as jnp
from jaxinfer.cache.base import Geometry, Items
from jaxinfer.cache.context import PushContext
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.cache.presets import kivi

geometry = Geometry(num_kv_heads=2, head_dim=32, capacity=64)
new, zero = jnp.zeros((1, 2, 1, 32)), jnp.zeros(1, jnp.int32)
items = Items(k=new, v=new, pos=jnp.zeros((1, 1, 1), jnp.int32))
maps = {"query_inner": (4, 32, 8), "query_outer": (4, 8, 3), "key_inner": (2, 32, 8)}
maps |= {"key_outer": (2, 8, 3), "mix": (2, 3, 3), "scale": (2, 3), "mix_scale": (2, 3)}
aux = {"feature_map": {name: jnp.zeros(shape) for name, shape in maps.items()}}
for tier in (*kivi(group=16, residual=16, value_flush="block").tiers, LowRank(rank=3)):
    ctx = PushContext(n_in=zero, count=zero, after=zero, length=zero)
    jax.eval_shape(lambda s: tier.push(s, aux, items, ctx), tier.init(geometry, 1))
languages = ("jax.experimental.pallas", "pallas_kernels.common")
assert not [name for name in sys.modules if name.startswith(languages)]
"""


def test_a_cpu_imports_no_kernel_language_to_write_a_cache():
    done = subprocess.run([sys.executable, "-c", ON_A_CPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
