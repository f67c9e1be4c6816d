"""Feed-forward blocks over listed neurons: every instruction set against float64 in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from jaxinfer.cpu_kernels.listed_mlp import ACTIVATIONS, listed_mlp
from jaxinfer.nn.block_mlp import BlockWeights, block_mlp, union_list
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Router, Rule
from jaxinfer.sparsity.mlp import SparseMlp
from tests.cpu_kernels.using import computing, every_set, needs_kernels

pytestmark = needs_kernels

ACTIVATE = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}
ODD_SIZES = [(1, 1, 1, 1), (16, 17, 3, 1), (5, 31, 2, 7), (2, 64, 4, 16), (4, 130, 1, 5)]


def problem(seed):
    """Keywords of `listed_mlp`."""
    rng = np.random.default_rng(seed)
    if seed < len(ODD_SIZES):
        rows, width, blocks, size = ODD_SIZES[seed]
    else:
        rows, width, blocks, size = (int(rng.integers(1, most)) for most in (17, 300, 9, 40))
    neurons, is_int8, is_gated = blocks * size, seed % 2 == 1, seed % 3 > 0

    def weight():
        shape = (neurons, width)
        if is_int8:
            return rng.integers(-128, 128, shape, dtype=np.int8)
        return rng.normal(size=shape).astype(np.float32) / np.float32(width**0.5)

    def numbers(least=-1.0):
        return rng.uniform(least, 1, neurons).astype(np.float32)

    live = int(rng.integers(0, blocks + 1)) if seed >= len(ODD_SIZES) else blocks
    given = {
        "x": rng.normal(size=(rows, width)).astype(np.float32), "up": weight(), "down": weight(),
        "blocks": rng.permutation(blocks).astype(np.int32), "live": np.int32(live),
        "block_size": size, "activation": ACTIVATIONS[seed % 4],
    }  # fmt: skip
    given |= {"gate": weight()} if is_gated else {}
    given |= {"own": rng.random((rows, blocks)) < 0.6} if seed % 4 else {}
    given |= {"up_bias": numbers()} if seed % 5 < 2 else {}
    given |= {"gate_bias": numbers()} if is_gated and seed % 5 == 1 else {}
    if is_int8:
        given |= {"up_scale": numbers(0.1) / 50, "hidden_scale": numbers(0.1)}
        given |= {"gate_scale": numbers(0.1) / 50} if is_gated else {}
    given["blocks"][live:] = -7  # what is behind the count is not looked at
    return given


def exact(given):
    """The result in float64, and the sum of the magnitudes of its terms."""
    x = given["x"].astype(np.float64)
    if given["up"].dtype == np.int8:
        scale = np.maximum(np.abs(given["x"]).max(1), np.float32(1e-30)) * np.float32(1 / 127)
        x = np.rint(given["x"] / scale[:, None]).astype(np.float64) * scale[:, None]
    size, neurons = given["block_size"], len(given["up"])

    def project(name):
        y = x @ given[name].astype(np.float64).T
        if f"{name}_scale" in given:
            y = y * given[f"{name}_scale"]
        return y + given.get(f"{name}_bias", 0)

    activate = ACTIVATE[given["activation"]]
    up = project("up")
    hidden = activate(project("gate")) * up if "gate" in given else activate(up)
    used = np.zeros((len(x), neurons // size), bool)
    for entry, block in enumerate(given["blocks"][: given["live"]]):
        used[:, block] = given["own"][:, entry] if "own" in given else True
    hidden = hidden * given.get("hidden_scale", 1) * np.repeat(used, size, axis=1)
    down = given["down"].astype(np.float64)
    return hidden @ down, np.abs(hidden) @ np.abs(down)


def run(given):
    arrays = {k: jnp.asarray(v) for k, v in given.items() if isinstance(v, np.ndarray | np.int32)}
    return listed_mlp(**given | arrays)


@every_set
def test_the_kernel_is_near_float64(instructions):
    with computing(instructions):
        for seed in range(48):
            given = problem(seed)
            found, (wanted, terms) = np.asarray(run(given)), exact(given)
            # the first products round like their own sums, of which a value is a small part
            assert (np.abs(found - wanted) <= 1e-5 * (terms + terms.max(initial=0))).all(), seed


@every_set
def test_nan_stays_in_its_row(instructions):
    for seed in (7, 12, 14, 17):
        given = problem(seed)
        given["live"], given["blocks"] = np.int32(len(given["blocks"])), np.sort(given["blocks"])
        given["blocks"][:] = np.arange(len(given["blocks"]))
        with computing(instructions):
            before = np.asarray(run(given))
            given["x"][0, -1] = np.nan
            after = np.asarray(run(given))
        if "own" not in given or given["own"][0].any():
            assert np.isnan(after[0]).all()
        np.testing.assert_array_equal(after[1:], before[1:])


def large(dtype):
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(3, 2048, 512)).astype(np.float32)
    given = {"x": rng.normal(size=(3, 512)).astype(np.float32), "live": np.int32(50)}
    if dtype == np.int8:
        weights = np.rint(weights * 20).astype(np.int8)
        given |= dict.fromkeys(("up_scale", "gate_scale"), np.full(2048, 0.05, np.float32))
    given |= dict(zip(("up", "gate", "down"), weights, strict=True))
    given |= {"blocks": rng.permutation(64).astype(np.int32), "own": rng.random((3, 64)) < 0.7}
    return given | {"block_size": 32, "activation": "silu"}


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_the_number_of_threads_changes_nothing(dtype):
    given, found = large(dtype), []
    for threads in (1, 2, 0):
        with computing(threads=threads):
            found += [np.asarray(run(given)) for _ in range(3)]
    assert len({y.tobytes() for y in found}) == 1
    wanted, terms = exact(given)
    assert (np.abs(found[0] - wanted) <= 1e-5 * terms.max()).all()


@pytest.mark.parametrize("blocks, live", [([0, 4], 2), ([0, -1], 2), ([0, 1], 3), ([0, 1], -1)])
def test_a_list_that_leaves_the_weights_is_refused(blocks, live):
    weight = np.ones((4 * 8, 16), np.float32)
    given = {
        "x": np.ones((1, 16), np.float32), "up": weight, "down": weight, "block_size": 8,
        "blocks": np.array(blocks, np.int32), "live": np.int32(live), "activation": "relu",
    }  # fmt: skip
    with pytest.raises(jax.errors.JaxRuntimeError, match="listed_mlp got a (block|count)"):
        jax.block_until_ready(run(given))


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_block_over_listed_neurons_is_that_of_the_mask(rows, is_int8):
    given = large(np.int8 if is_int8 else np.float32)
    rng = np.random.default_rng(1)
    names = [name for name in given if name in BlockWeights.__dataclass_fields__]
    extra = {"down_bias": rng.normal(size=512).astype(np.float32)}
    extra |= {"down_scale": np.full(512, 0.02, np.float32)} if is_int8 else {}
    weights = BlockWeights(**{k: jnp.asarray(v) for k, v in extra.items()},
                           **{name: jnp.asarray(given[name]) for name in names})  # fmt: skip
    selected = jnp.asarray(rng.random((rows, 64)) < 0.2)
    x = jnp.asarray(rng.normal(size=(rows, 512)), jnp.float32)
    backend = Backend.of("ffi", "cpu")
    form = jax.jit(
        lambda x, s: block_mlp(weights, x, s, block_size=32, activation="silu", backend=backend)
    )
    listed = union_list(selected)
    assert "jaxinfer_listed_mlp" in form.lower(x, listed).as_text()
    whole = form(x, selected)
    np.testing.assert_allclose(form(x, listed), whole, atol=2e-6 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("rows, listed", [(1, True), (16, True), (17, False)])
def test_a_step_lists_small_blocks_where_the_kernel_takes_its_rows(rows, listed):
    weights = BlockWeights(up=jnp.zeros((64, 32)), down=jnp.zeros((64, 32)))
    router = Router(outer=jnp.zeros((64, 32)), rule=Rule(most=1))
    block = SparseMlp(weights=weights, selector=router, unions=(0.1,) * 6)
    assert block.block_size == 1
    assert block.lists(rows, Backend.of("ffi", "cpu")) == listed
    assert not block.lists(rows, Backend.of("reference", "cpu"))
