"""The floors are positive, scale with bytes, and the dots-only program holds every kernel once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.inspection.hlo_text import parse
from jaxinfer.inspection.roofline import dots_only, floor_seconds, products, read_bandwidth
from jaxinfer.models.params import abstract_params


def tiny(**changes):
    return ModelConfig(
        **{
            **dict(family="llama", vocab_size=96, hidden_size=32, intermediate_size=48),
            **dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64),
            **dict(positions="none"),
            **changes,
        }
    )


def random_params(cfg):
    random = np.random.default_rng(0)  # numpy: nothing to compile
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.2, leaf.shape), leaf.dtype),
        abstract_params(cfg),
    )


def test_the_bandwidth_is_plausible_and_measured_once():
    first = read_bandwidth(32)
    assert 1e8 < first < 1e13
    assert read_bandwidth(32) == first


def test_the_floor_is_bytes_over_bandwidth():
    assert floor_seconds(50, 100.0) == 0.5
    with pytest.raises(ValueError, match="positive"):
        floor_seconds(1, 0.0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_the_step_multiplies_by_every_kernel_once(tied, gated):
    cfg = tiny(tie_embeddings=tied, gated_mlp=gated)
    x = jax.ShapeDtypeStruct((1, 1, 32), jnp.float32)
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(products, static_argnums=0).lower(cfg, abstract_params(cfg), x, steps)
    dots = lowered.as_text().count("stablehlo.dot_general")
    assert dots == 2 * (6 + gated) + 1
    computations = parse(lowered.compile().as_text()).computations.values()
    kept = [i for c in computations for i in c.instructions.values() if i.opcode == "dot"]
    assert len(kept) <= dots  # XLA may fuse some of them, but drops none: see the next test


def test_every_kernel_matters_to_the_result():
    cfg = tiny(num_layers=1)
    params = random_params(cfg)
    run = jax.jit(products, static_argnums=0)
    x, steps = jnp.ones((1, 1, 32)), jnp.int32(2)
    reference = run(cfg, params, x, steps)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    for index, (path, leaf) in enumerate(leaves):
        if path[-1].key == "weight":
            changed = [other for _, other in leaves]
            changed[index] = leaf + 1
            out = run(cfg, jax.tree_util.tree_unflatten(tree, changed), x, steps)
            assert jnp.abs(out - reference).max() > 1e-6, path


def test_the_loop_is_stable_over_many_steps():
    cfg = tiny()
    run = jax.jit(products, static_argnums=0)
    out = run(cfg, random_params(cfg), jnp.ones((1, 1, 32)), jnp.int32(200))
    assert jnp.isfinite(out).all() and jnp.abs(out).max() < 100


def test_dots_only_gives_milliseconds_per_step():
    cfg = tiny(num_layers=1)
    params = random_params(cfg)
    assert 0 < dots_only(cfg, params, batch=1, repeats=2) < 1000
