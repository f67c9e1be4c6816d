"""Attention over selected heads: reference, interpret mode, CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.sparse_heads import sparse_heads
from pallas_kernels.sparse_heads.configs import Config
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda


def problem(seed: int):
    """Random shapes and arguments. What must not be read is NaN: unselected heads and slots behind
    the length; list entries behind the count point anywhere."""
    rng = np.random.default_rng(seed)
    b, k, g = (int(rng.integers(1, high)) for high in (4, 6, 20))
    s, h = int(rng.integers(1, 200)), int(rng.choice([8, 24, 64, 80, 128]))
    dtype = rng.choice(["float32", "bfloat16"])
    cap = int(rng.integers(1, k + 1))
    count, length = rng.integers(0, cap + 1, b), rng.integers(0, s + 1, b)
    groups = np.stack([rng.permutation(k)[:cap] for _ in range(b)])
    live = np.arange(cap) < count[:, None]
    selected = np.zeros((b, k), bool)
    for row in range(b):
        selected[row, groups[row, live[row]]] = True
    groups = np.where(live, groups, rng.choice([-(2**31), -1, 0, k, 2**31 - 1], groups.shape))

    q, keys, values = (rng.normal(size=shape) for shape in ((b, k, g, h), *[(b, k, s, h)] * 2))
    seen = selected[..., None] & (np.arange(s) < length[:, None])[:, None]
    for x in (keys, values):
        x[~seen] = np.nan
    q[~selected] = np.nan
    floats = [jnp.asarray(x, dtype) for x in (q, keys, values)]
    integers = [jnp.asarray(x, jnp.int32) for x in (length, groups, count)]
    options = {
        "scale": float(rng.uniform(0.05, 0.5)),
        "config": rng.choice([None, Config(keys=16, splits=3)]),
    }
    return (*floats, *integers), options, seen, 1e-5 if dtype == "float32" else 2e-2


QUICK, ALL = range(3), [pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 50)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_the_kernel_agrees_with_its_reference(seed):
    args, options, _, tolerance = problem(seed)

    def run(*args, implementation):
        acc, top, norms = sparse_heads(*args, **options, implementation=implementation)
        empty = top == -1e30  # apart: next to it, any difference of two maxima is small
        return acc, jnp.where(empty, 0, top), norms, empty

    agree(run, *args, tolerance=tolerance)


@pytest.mark.parametrize("seed", [*range(3, 9), *ALL[6:]])
def test_the_reference_is_attention_with_a_mask(seed):
    args, options, seen, tolerance = problem(seed)
    acc, top, norms = sparse_heads(*args, scale=options["scale"], implementation="reference")
    q, k, v = (np.nan_to_num(np.asarray(x, np.float64)) for x in args[:3])
    scores = np.einsum("bkgh,bksh->bkgs", q, k) * options["scale"]
    weights = np.where(seen[:, :, None], np.exp(scores), 0)
    total = weights.sum(axis=-1)
    some = np.broadcast_to(seen.any(axis=-1)[..., None], total.shape)
    expected = np.einsum("bkgs,bksh->bkgh", weights, v)[some] / total[some][:, None]
    found = np.asarray(acc)[some] / np.asarray(norms)[some][:, None]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    lse = np.asarray(top + jnp.log(norms))[some]
    np.testing.assert_allclose(lse, np.log(total[some]), rtol=0, atol=tolerance)
    for x, identity in ((acc, 0), (top, np.float32(-1e30)), (norms, 0)):
        assert (np.asarray(x)[~some] == identity).all()


def test_with_all_heads_it_is_dense_attention():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((2, 3, 2, 16), (2, 3, 40, 16), (2, 3, 40, 16))
    )
    length, count = jnp.asarray([40, 7], jnp.int32), jnp.full(2, 3, jnp.int32)
    groups = jnp.tile(jnp.arange(3, dtype=jnp.int32), (2, 1))
    found = sparse_heads(q, k, v, length, groups, count, scale=0.2, implementation="interpret")
    visible = jnp.ones((1, 1, 1, 40), bool)
    expected = dense_attention(q[:, :, :, None], k, v, visible, None, length, scale=0.2)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b[:, :, :, 0], rtol=1e-5, atol=1e-5)


SHAPES = [
    pytest.param(8, 8, 4, 128, "bfloat16", id="llama-3"),
    pytest.param(1, 32, 1, 128, "bfloat16", id="llama-2"),
    pytest.param(1, 4, 2, 256, "bfloat16", id="wide heads", marks=pytest.mark.slow),
    pytest.param(16, 3, 3, 64, "float32", id="float32"),
    pytest.param(2, 4, 40, 80, "float32", id="odd float32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("b, k, g, h, dtype", SHAPES)
def test_it_compiles_for_an_h200_without_spills(b, k, g, h, dtype):
    def array(*shape, of=dtype):
        return jax.ShapeDtypeStruct(shape, of)

    cache, each = array(b, k, 8192, h), array(b, of="int32")
    args = array(b, k, g, h), cache, cache, each, array(b, k, of="int32"), each
    run = functools.partial(sparse_heads, scale=0.1)
    lowers_for_cuda(run, *args, calls=2)  # its splits are merged
    compiles_without_spills(run, *args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (2, 2, 16)}, r"q must have shape \[_, _, _, _\], got \[2, 2, 16\]"),
        ({"k": (2, 3, 40, 16)}, r"k must have shape \[2, 2, _, 16\], got \[2, 3, 40, 16\]"),
        ({"v": (2, 2, 41, 16)}, r"v must have shape \[2, 2, 40, 16\], got \[2, 2, 41, 16\]"),
        ({"length": ()}, r"length must have shape \[2\], got \[\]"),
        ({"groups": (1, 2)}, r"groups must have shape \[2, _\], got \[1, 2\]"),
        ({"count": (1,)}, r"count must have shape \[2\], got \[1\]"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given = {"q": (2, 2, 3, 16), "k": (2, 2, 40, 16), "v": (2, 2, 40, 16)}
    given |= {"length": (2,), "groups": (2, 2), "count": (2,)}
    integers = ("length", "groups", "count")
    arrays = {
        name: jnp.zeros(change.get(name, shape), jnp.int32 if name in integers else jnp.float32)
        for name, shape in given.items()
    }
    more = {name: x for name, x in change.items() if name not in given}
    with pytest.raises(ValueError, match=message):
        sparse_heads(**arrays, scale=0.1, **more)


def test_dtypes_are_checked():
    q, k, each = jnp.zeros((1, 2, 3, 16)), jnp.zeros((1, 2, 40, 16)), jnp.ones(1, jnp.int32)
    run = functools.partial(sparse_heads, scale=0.1)
    with pytest.raises(ValueError, match="v must have the dtype of q, float32, got bfloat16"):
        run(q, k, k.astype(jnp.bfloat16), each, each[None], each)
    with pytest.raises(ValueError, match="length must be integers, got float32"):
        run(q, k, k, each.astype(jnp.float32), each[None], each)
