"""The training of one layer's feature maps (arXiv 2402.09398, section 3).

They are fitted so that LESS attention, after the output projection, equals full attention there.
Every step takes sequences and policies at random, and every `stride`-th row; the maps that do best
on the sequences held out are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxinfer.cache.feature_maps import rounded
from jaxinfer.nn.linear import linear
from jaxinfer.train.less.data import Harvester, LayerData
from jaxinfer.train.less.objective import Eviction, add_low_rank, strided_low_rank
from jaxinfer.train.less.recipe import LessRecipe
from jaxinfer.train.loop import Loss, fit
from jaxinfer.train.run_folder import append_line, read_arrays, write_arrays
from jaxinfer.typing import Params

if TYPE_CHECKING:
    from jaxinfer.nn.feature_map import FeatureMaps

Errors = Callable[..., Array]
"""`errors(maps, batch, key=None) -> f32[B, M]`, see `row_errors`."""


def train_layer(
    harvester: Harvester,
    layer: Params,
    data: LayerData,
    policies: tuple[Eviction, ...],
    recipe: LessRecipe,
    folder: Path,
    report: Callable[[int], None] = lambda done: None,
    *,
    seed: int = 0,
) -> tuple[Params, dict[str, float | list[float]]]:
    """One layer's feature maps (the best on validation, as they are stored) and what they achieve.

    The losses are mean squared errors over the rows that have lost tokens, by policy: of the policy
    alone ("bare"), of Baseline+ ("plus") and of LESS ("less"), on validation sequences. Training
    and "recovered" weigh policies alike, each by its bare loss.
    """
    from jaxinfer.nn.feature_map import FeatureMaps

    cfg = harvester.cfg
    train = len(data.q) - max(1, round(recipe.validation * len(data.q)))
    if train < 1:
        raise ValueError(f"{len(data.q)} sequences are too few to train on and validate; give more")
    module = FeatureMaps(
        cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, recipe.hidden, recipe.rank, recipe.dropout
    )
    out, errors = layer["attn"]["out"], row_errors(module)
    measure = _Measure(jax.jit(errors), out, recipe.stride)
    bare = measure(None, data, policies, train)
    # Every policy counts alike, and Adam's epsilon is small beside the gradients.
    scales = (1 / np.maximum(bare, 1e-30)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    best = folder / "best.npz"

    def validate(step: int, maps: Params) -> None:
        maps = rounded({name: np.asarray(x) for name, x in maps.items()})
        value = float((scales * measure(maps, data, policies, train)).mean())
        append_line(folder / "validation.jsonl", {"step": step, "share_of_bare": value})
        if not best.is_file() or value < float(read_arrays(best)["value"]):
            write_arrays(best, {"value": np.asarray(value)} | maps)

    rate = optax.exponential_decay(recipe.learning_rate, recipe.steps // 4, 0.5, staircase=True)
    marks = {round(recipe.steps * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)}
    fit(
        _weighted(errors), _new_maps(module, seed), optax.adam(rate),
        _Batches(data, policies, recipe, train, scales, out, seed, report), steps=recipe.steps,
        folder=folder, seed=seed, save_every=max(1, recipe.steps // 2),
        log_every=max(1, recipe.steps // 20), snapshots=marks | {0}, on_snapshot=validate,
    )  # fmt: skip
    maps = read_arrays(best)
    maps.pop("value")
    less = measure(maps, data, policies, train)
    wider = [policy.widened(recipe.extra) for policy in policies]
    plus = measure(None, _under(wider, harvester, data, train), policies)
    return maps, {
        "bare": bare.tolist(),
        "plus": plus.tolist(),
        "less": less.tolist(),
        "recovered": float(1 - (less / bare).mean()),
        "recovered_beyond_plus": float(1 - (less / plus).mean()),
    }


def row_errors(module: "FeatureMaps") -> Errors:
    """`errors(maps, batch, key) -> f32[B, M]`: each row's squared error after the output
    projection `batch["out"]`, averaged over channels.

    Parameters of None leave the policy alone; with a key hidden units drop out.
    """

    apply: Callable[..., Any] = module.apply

    def errors(maps: Params | None, batch: dict[str, Any], key: jax.Array | None = None):
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
        y = batch["kept"]
        if maps is not None:
            train = key is not None
            rngs = [None, None] if key is None else [{"dropout": k} for k in jax.random.split(key)]
            variables = {"params": maps}
            phi = apply(variables, batch["q"], train, method="query", rngs=rngs[0])
            psi = apply(variables, batch["k"], train, method="key", rngs=rngs[1])
            y = add_low_rank(y, batch["lse"], *strided_low_rank(phi, psi, batch["v"]))
        rows, size = y.shape[0], y.shape[2]
        y = linear(batch["out"], y.transpose(0, 2, 1, 3).reshape(rows, size, -1))
        return jnp.square(y.astype(jnp.float32) - batch["target"]).mean(axis=-1)

    return errors


@dataclass(frozen=True)
class _Measure:
    """Mean errors by policy, of the rows that have lost tokens in sequences `first` and later."""

    errors: Errors
    out: Params
    stride: int

    def __call__(
        self, maps: Params | None, data: LayerData, policies: Sequence[Eviction], first: int = 0
    ) -> np.ndarray:
        sums = np.zeros((len(policies), 2))
        for row in range(first, len(data.q)):
            for policy in range(len(policies)):
                batch = data.batch([row], policies, [policy], [(self.stride + 1) // 2], self.stride)
                error = np.asarray(self.errors(maps, batch | {"out": self.out}), np.float64)
                sums[policy] += (error * batch["weight"]).sum(), batch["weight"].sum()
        return sums[:, 0] / np.maximum(sums[:, 1], 1)


@dataclass(frozen=True)
class _Batches:
    """The batch of a step: a pure function of it."""

    data: LayerData
    policies: Sequence[Eviction]
    recipe: LessRecipe
    train: int  # the first so many sequences are trained on
    scales: np.ndarray  # of each policy's errors
    out: Params
    seed: int
    report: Callable[[int], None]

    def __call__(self, step: int) -> dict[str, np.ndarray | Params]:
        self.report(step)
        size, stride = self.recipe.batch, self.recipe.stride
        generator = np.random.default_rng([self.seed, step])
        # Every sequence equally often: positions in a fresh order per pass.
        first = np.arange(step * size, (step + 1) * size)
        rows = [int(self._order(int(i // self.train))[i % self.train]) for i in first]
        which = generator.integers(len(self.policies), size=size)
        shifts = generator.integers(1, stride + 1, size=size)
        batch = self.data.batch(rows, self.policies, which.tolist(), shifts.tolist(), stride)
        rows_used = np.float32(max(batch["weight"].sum(), 1))
        batch["weight"] *= self.scales[which, None]
        # Everything that differs between layers is an input: one program serves all of them.
        return batch | {"out": self.out, "rows": rows_used}

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, 1]).permutation(self.train)


def _weighted(errors: Errors) -> Loss:
    def loss(maps: Params, batch: Mapping[str, Array], key: Array):
        return (errors(maps, batch, key) * batch["weight"]).sum() / batch["rows"], {}

    return loss


def _new_maps(module: "FeatureMaps", seed: int) -> Params:
    example = jnp.zeros((1, module.num_heads, 1, module.head_dim))
    made = module.init(jax.random.key(seed), example, example[:, : module.num_kv_heads])
    return dict(made["params"])


def _under(
    policies: Sequence[Eviction], harvester: Harvester, data: LayerData, first: int
) -> LayerData:
    """Sequences `first` and later under other policies."""
    found = []
    for row in range(first, len(data.q)):
        q, k, v = (jnp.asarray(x[row], jnp.float32)[None] for x in (data.q, data.k, data.v))
        found.append(harvester.kept(policies, q, k, v))
    arrays = {name: np.stack([one[name] for one in found]) for name in found[0]}
    part = {name: getattr(data, name)[first:] for name in ("q", "k", "v", "target")}
    return LayerData(**part, **arrays)
