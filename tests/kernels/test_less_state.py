"""LESS's low-rank state: reference, interpret mode, CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.base import Items
from jaxinfer.cache.lowrank import FeatureSegment, LowRank, LowRankState
from jaxinfer.inspection import hlo
from jaxinfer.ops.attention import AttentionSpec
from pallas_kernels.activation import gelu
from pallas_kernels.less_state import low_rank_read, low_rank_update
from pallas_kernels.less_state.configs import Config, heuristic
from tests.cache.pushing import pushing
from tests.kernels.checking import agree, compiles_without_spills, lowers_for_cuda

SLOW = pytest.mark.slow
KEY = ("key_inner", "key_outer", "mix", "scale", "mix_scale")


class Problem:
    """Random shapes and arguments: ragged, grouped, odd sizes, empty states and zero kernels."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        b, k, g, t = (int(rng.integers(1, high)) for high in (20, 4, 4, 6))
        a = int(rng.choice([1, 1, 3, 18, 40]))
        h, e = int(rng.choice([8, 24, 64, 80])), int(rng.choice([16, 40, 128]))
        self.rank = int(rng.choice([1, 4, 6, 8, 16, 20]))
        self.dtype = rng.choice(["float32", "bfloat16"])
        r, n = self.rank, k * g
        shapes = {"query_inner": (n, h, e), "query_outer": (n, e, r), "mix": (k, r, r)}
        shapes |= {"key_inner": (k, h, e), "key_outer": (k, e, r)}
        self.kernels = {
            name: jnp.asarray(rng.normal(size=x) * (2 / (x[1] + x[2])) ** 0.5, jnp.float32)
            for name, x in shapes.items()
        }
        scale = rng.choice([0.0, 1e-4, 1.0], p=[0.1, 0.3, 0.6])  # of psi, as learned or at birth
        for name in ("scale", "mix_scale"):
            self.kernels[name] = jnp.asarray(scale * rng.normal(size=(k, r)), jnp.float32)

        def some(*shape, of=self.dtype):
            return jnp.asarray(rng.normal(size=shape) * 2, of)

        self.q, self.k, self.v = some(b, k, g, t, h), some(b, k, a, h), some(b, k, a, h)
        full = jnp.asarray(rng.random(b) < 0.8)  # the others have lost nothing yet
        # As large as what is added, so that errors of either are seen.
        self.num = scale * some(b, k, r, h, of="float32") * full[:, None, None, None]
        self.den = scale * jnp.abs(some(b, k, r, of="float32")) * full[:, None, None]
        self.count = jnp.asarray(rng.integers(0, a + 1, b), jnp.int32)
        self.config = rng.choice([None, Config(rows=16, hidden=16), Config(rows=32, hidden=64)])

    @property
    def query(self):
        return self.kernels["query_inner"], self.kernels["query_outer"]

    @property
    def key(self):
        return tuple(self.kernels[name] for name in KEY)


QUICK, ALL = range(3), [pytest.param(seed, marks=SLOW) for seed in range(3, 44)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_the_kernels_agree_with_their_references(seed):
    p = Problem(seed)

    def read(*args, **options):
        acc, top, norms = low_rank_read(*args, config=p.config, **options)
        total = norms * jnp.exp(
            top
        )  # a merge sees these; the logarithm of a near-zero is ill-posed
        return acc * total[..., None], total, norms

    agree(read, p.q, p.num, p.den, *p.query, tolerance=2e-5)
    run = functools.partial(low_rank_update, config=p.config)
    agree(run, p.num, p.den, p.k, p.v, p.count, *p.key, tolerance=2e-5)


@pytest.mark.parametrize("seed", [4, *(pytest.param(n, marks=SLOW) for n in (5, 11))])
def test_the_references_are_the_low_rank_tier_of_the_library(seed):
    p = Problem(seed)
    state = LowRankState(num=p.num, den=p.den)
    segment = FeatureSegment(state=state, aux=p.kernels, rank=p.rank)
    spec = AttentionSpec(scale=1.0)
    wanted = jax.jit(lambda q: segment.partial(spec, q, p.count, None))(p.q)
    found = jax.jit(low_rank_read)(p.q, p.num, p.den, *p.query)
    for a, b in zip((wanted.acc, wanted.max, wanted.sum), found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    items = Items(k=p.k, v=p.v, pos=jnp.zeros(p.k.shape[:3], jnp.int32), attn_weight=None)
    tier, aux = LowRank(rank=p.rank), {"feature_map": p.kernels}
    push = jax.jit(lambda items: tier.push(state, aux, items, pushing(p.count, p.count, p.count)))
    wanted, *_ = push(items)
    num, den = jax.jit(low_rank_update)(p.num, p.den, p.k, p.v, p.count, *p.key)
    np.testing.assert_allclose(num, wanted.num, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(den, wanted.den, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_nothing_absorbed_is_the_identity_of_the_merge(implementation):
    p = Problem(1)
    none = (jnp.zeros_like(p.num), jnp.zeros_like(p.den))
    read, update = (
        jax.jit(functools.partial(run, implementation=implementation))
        for run in (low_rank_read, low_rank_update)
    )
    acc, top, norms = read(p.q, *none, *p.query)
    assert (acc == 0).all() and (top == -1e30).all() and (norms == 0).all()
    key = dict(p.kernels, scale=jnp.zeros_like(p.kernels["scale"]))
    num, den = update(*none, p.k, p.v, p.count, *(key[name] for name in KEY))
    assert (num == 0).all() and (den == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_tokens_behind_count_leave_no_trace(implementation, tokens):
    p = Problem(2)
    k, v = (jnp.repeat(x[:, :, :1], tokens, axis=2) for x in (p.k, p.v))
    count = p.count.at[0].set(0).clip(0, tokens)
    gone = jnp.arange(tokens) < count[:, None, None]
    run = jax.jit(functools.partial(low_rank_update, implementation=implementation))
    clean = run(p.num, p.den, k, v, count, *p.key)
    k, v = (jnp.where(gone[..., None], x, jnp.nan) for x in (k, v))
    found = run(p.num, p.den, k, v, count, *p.key)
    jax.tree.map(np.testing.assert_array_equal, clean, found)
    np.testing.assert_array_equal(found[0][0], p.num[0])


def test_tokens_absorbed_together_or_one_by_one_give_the_same_state():
    p = Problem(3)
    many = jnp.full(p.k.shape[0], p.k.shape[2], jnp.int32)
    run = jax.jit(functools.partial(low_rank_update, implementation="interpret"))
    together = run(p.num, p.den, p.k, p.v, many, *p.key)
    num, den = p.num, p.den
    for a in range(p.k.shape[2]):
        one = slice(a, a + 1)
        num, den = run(num, den, p.k[:, :, one], p.v[:, :, one], many, *p.key)
    for a, b in zip((num, den), together, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_gelu_is_exact_to_float32_on_both_sides():
    from scipy.special import erfc

    x = np.linspace(-12, 12, 40001).astype(np.float32)
    wanted = 0.5 * x.astype(np.float64) * erfc(-x.astype(np.float64) / 2**0.5)
    found = np.asarray(gelu(jnp.asarray(x)))
    # Relative, the tail included: exp(-x^2 / 2) carries the rounding of x^2 / 2, at most 72.
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=0)
    near = np.abs(x) < 2
    np.testing.assert_allclose(found[near], wanted[near], rtol=1e-6, atol=0)


def test_layers_can_be_mapped_over():
    p = Problem(0)
    run = jax.jit(functools.partial(low_rank_update, implementation="interpret"))
    args = (p.num, p.den, p.k, p.v, p.count, *p.key)
    found = jax.vmap(run)(*(jnp.stack([x, x]) for x in args))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-5), found, run(*args)
    )


SHAPES = [
    pytest.param(8, 32, 1, 1, 128, 8, id="llama-2"),
    pytest.param(64, 8, 4, 1, 128, 16, id="llama-3, 64 rows", marks=SLOW),
    pytest.param(1, 3, 3, 64, 64, 8, id="smollm2, tree of 64", marks=SLOW),
    pytest.param(8, 8, 4, 64, 128, 16, id="chunks of 64", marks=SLOW),
    pytest.param(2, 4, 2, 1, 80, 6, id="odd sizes"),
]


def shapes(b, k, g, t, h, rank, evicted=1, hidden=512):
    def array(*shape, of="float32"):
        return jax.ShapeDtypeStruct(shape, of)

    n, bf16 = k * g, "bfloat16"
    state = (array(b, k, rank, h), array(b, k, rank))
    query = (array(n, h, hidden), array(n, hidden, rank))
    key = (array(k, h, hidden), array(k, hidden, rank), array(k, rank, rank))
    key += (array(k, rank), array(k, rank))
    keys = (array(b, k, evicted, h, of=bf16),) * 2
    read = (array(b, k, g, t, h, of=bf16), *state, *query)
    return read, (*state, *keys, array(b, of="int32"), *key)


@pytest.mark.parametrize("b, k, g, t, h, rank", SHAPES)
def test_reading_compiles_for_an_h200_without_spills(b, k, g, t, h, rank):
    read, _ = shapes(b, k, g, t, h, rank)
    lowers_for_cuda(low_rank_read, *read)
    compiles_without_spills(low_rank_read, *read)


@pytest.mark.parametrize("evicted", [1, *(pytest.param(n, marks=SLOW) for n in (4, 256))])
@pytest.mark.parametrize("b, k, g, t, h, rank", SHAPES)
def test_absorbing_compiles_for_an_h200_in_place_and_without_spills(b, k, g, t, h, rank, evicted):
    _, update = shapes(b, k, g, t, h, rank, evicted)
    lowers_for_cuda(low_rank_update, *update)
    executable = compiles_without_spills(
        low_rank_update, *update, donate_argnames=("num", "den")
    )  # fmt: skip
    assert hlo.unaliased_leaves(executable, update[:2]) == []
    assert hlo.cache_sized_copies(executable, update[:1]) == []
    assert "output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}" in executable.as_text()


def test_tiles_grow_only_when_every_multiprocessor_has_one():
    assert heuristic(32, 1).rows == heuristic(32, 64).rows == 16
    assert heuristic(32, 160).rows == heuristic(128, 512).rows == 32
    assert heuristic(8, 256, together=256).rows == 32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (2, 3, 16)}, r"k must have shape \[_, _, _, _\], got \[2, 3, 16\]"),
        ({"v": (2, 3, 4, 8)}, r"v must have shape \[2, 3, 5, 8\], got \[2, 3, 4, 8\]"),
        ({"num": (2, 3, 4, 16)}, r"num must have shape \[2, 3, _, 8\], got \[2, 3, 4, 16\]"),
        ({"den": (2, 4)}, r"den must have shape \[2, 3, 4\], got \[2, 4\]"),
        ({"count": (1,)}, r"count must have shape \[2\], got \[1\]"),
        ({"outer": (3, 16, 4)}, r"outer must have shape \[3, 32, 4\], got \[3, 16, 4\]"),
        ({"mix": (3, 4)}, r"mix must have shape \[3, 4, 4\], got \[3, 4\]"),
        ({"num": jnp.zeros((2, 3, 4, 8), jnp.bfloat16)}, "num must be float32.*got bfloat16"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given = {"num": (2, 3, 4, 8), "den": (2, 3, 4), "k": (2, 3, 5, 8), "v": (2, 3, 5, 8)}
    given |= {"count": (2,), "inner": (3, 8, 32), "outer": (3, 32, 4), "mix": (3, 4, 4)}
    given |= {"scale": (3, 4), "mix_scale": (3, 4)} | change
    arguments = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in given.items()}
    with pytest.raises(ValueError, match=message):
        low_rank_update(**arguments)


def test_a_read_needs_one_map_per_query_head():
    read, _ = shapes(1, 2, 2, 1, 16, 8)
    q, num, den, inner, outer = (jnp.zeros(x.shape) for x in read)
    with pytest.raises(ValueError, match=r"inner must have shape \[4, 16, _\], got \[2, 16, 512\]"):
        low_rank_read(q, num, den, inner[:2], outer)


def test_tiles_are_powers_of_two():
    with pytest.raises(ValueError, match="powers of two from 16 on, got 24 and 64"):
        Config(rows=24, hidden=64)
