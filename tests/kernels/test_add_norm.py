"""The residual sum and norm: reference, interpret mode, CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels.add_norm import add_norm
from pallas_kernels.add_norm.configs import Config
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda


def problem(seed: int):
    """Random rows of odd widths, some large, with or without a sum and a bias."""
    rng = np.random.default_rng(seed)
    rows, width = int(rng.integers(1, 9)), int(rng.integers(1, 1100))
    dtype = rng.choice(["float32", "bfloat16"])

    def some(*shape, of=dtype):
        return jnp.asarray(rng.normal(size=shape) * rng.choice([1.0, 30.0]), of)

    delta = some(rows, width) if rng.random() < 0.7 else None
    bias = some(width, of="float32") if rng.random() < 0.5 else None
    run = functools.partial(
        add_norm, kind=rng.choice(["rms", "layer"]), eps=1e-5,
        config=rng.choice([None, Config(warps=1), Config(warps=8)]),
    )  # fmt: skip
    args = (some(rows, width), delta, some(width, of="float32"), bias)
    return run, args, 1e-5 if dtype == "float32" else 1e-2


@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_agrees_with_its_reference(seed):
    run, args, tolerance = problem(seed)
    agree(run, *args, tolerance=tolerance)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("kind", ["rms", "rms_outside", "layer"])
def test_it_is_the_norm_of_the_sum_as_torch_computes_it(kind, implementation):
    rng = np.random.default_rng(5)
    x, delta = rng.normal(size=(2, 3, 24)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 24)).astype(np.float32)
    bias = bias if kind == "layer" else None
    y, normed = add_norm(
        *(None if z is None else jnp.asarray(z) for z in (x, delta, scale, bias)),
        kind=kind, eps=0.1, implementation=implementation,
    )  # fmt: skip
    total = torch.from_numpy(x + delta)
    if kind == "layer":
        wanted = torch.nn.functional.layer_norm(
            total, (24,), torch.from_numpy(scale), torch.from_numpy(bias), 0.1
        )
    elif kind == "rms":
        wanted = torch.nn.functional.rms_norm(total, (24,), torch.from_numpy(scale), 0.1)
    else:
        root = total.norm(dim=-1, keepdim=True) / 24**0.5
        wanted = total / (root + 0.1) * torch.from_numpy(scale)
    np.testing.assert_array_equal(y, x + delta)
    np.testing.assert_allclose(normed, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rows, width, kind, dtype",
    [
        pytest.param(1, 576, "rms", "bfloat16", id="smollm2"),
        pytest.param(64, 4096, "rms", "bfloat16", id="llama-2, tree of 64"),
        pytest.param(1, 16384, "rms", "float32", id="the widest"),
        pytest.param(8, 768, "layer", "float32", id="gpt2"),
    ],
)
def test_it_compiles_for_an_h200_without_spills(rows, width, kind, dtype):
    x, scale = jax.ShapeDtypeStruct((rows, width), dtype), jax.ShapeDtypeStruct((width,), dtype)
    run = functools.partial(add_norm, kind=kind, eps=1e-5)
    args = (x, x, scale, scale if kind == "layer" else None)
    lowers_for_cuda(run, *args)
    compiles_without_spills(run, *args)


def test_bad_input_is_named():
    x = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match="delta must have shape"):
        add_norm(x, x[:1], x[0], kind="rms", eps=1e-5)
    with pytest.raises(ValueError, match="scale must have shape"):
        add_norm(x, None, x[0, :4], kind="rms", eps=1e-5)
    with pytest.raises(ValueError, match="kind must be 'rms', 'rms_outside' or 'layer'"):
        add_norm(x, None, x[0], kind="batch", eps=1e-5)
