"""The two stages of a training, and what its model is on held-out windows.

A run may be killed at any moment. Its folder holds `options.json`, `groups.npz`, and one folder of
`jaxinfer.train.loop` per stage: `stage-1` and `stage-2`.
"""

import zlib
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from jaxinfer.decode.model import Model
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.progress import Report, silent
from jaxinfer.sparsity.grouping import group_neurons, input_weights
from jaxinfer.train import optimizers
from jaxinfer.train.loop import Loss, fit
from jaxinfer.train.lte.measure import Measured, measure, with_unions
from jaxinfer.train.lte.objective import learning, serving
from jaxinfer.train.lte.recipe import LteRecipe
from jaxinfer.train.lte.student import Student, check_model
from jaxinfer.train.run_folder import check_options, read_arrays, write_arrays
from jaxinfer.typing import Params

WARMUP = 0.06  # of the steps, as in the paper; then the rate falls to 0 as a line
CLIP = 1.0
STEERING_RATE = 0.02  # of log eta, per step and logarithm of density


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model: `state` is what `Student` puts together, `measured` what it is on held-out
    windows, `results` all that a run found."""

    student: Student
    state: Params
    measured: Measured
    results: dict[str, Any]

    def params(self) -> Params:
        """The parameters that serve."""
        return with_unions(self.student.sparse_model(self.state), self.measured)


def train_lte(
    model: Model,
    windows: Int[np.ndarray, "Q T"],
    held_out: Int[np.ndarray, "P T"],
    recipe: LteRecipe,
    run: Path,
    *,
    save_every: int = 200,
    report: Report = silent,
) -> Trained:
    """A model trained on `windows` of text and measured on others. A killed run goes on from `run`.

    Raises:
      ValueError: the model cannot be trained so, or the run was started with other options.
    """
    cfg, run = model.config, Path(run).absolute()
    check_model(cfg, model.params, recipe)
    run.mkdir(parents=True, exist_ok=True)
    options = {
        "model": model.name, "fingerprint": fingerprint(model.params),
        "windows": list(windows.shape), "crc32": zlib.crc32(windows.tobytes()),
    }  # fmt: skip
    check_options(run, asdict(recipe) | options)
    orders = _orders(model, recipe, run / "groups.npz", report)
    student = Student.of(cfg, model.params, recipe, orders)
    parts, routers, fixed = student.parts(), student.routers(), student.fixed()
    stages = _Stages(windows, recipe, run, save_every, report)

    results = {"dense": measure(cfg, model.params, held_out).record(cfg, recipe.block_size)}
    if recipe.learns_routers:
        steering = {"log_eta": jnp.log(jnp.float32(recipe.eta))} if recipe.is_steered else {}
        state = stages.run(
            "stage-1", learning(student), parts | routers | steering, fixed, recipe.steps
        )
        routers, parts = {"routers": state["routers"]}, {name: state[name] for name in parts}
    else:
        parts = stages.run("stage-1", serving(student), parts, fixed | routers, recipe.steps)
    before = measure(cfg, student.sparse_model(fixed | parts | routers), held_out)
    results["before"] = before.record(cfg, recipe.block_size)
    parts = stages.run("stage-2", serving(student), parts, fixed | routers, recipe.adapt_steps)
    state = fixed | parts | routers
    measured = measure(cfg, student.sparse_model(state), held_out)
    results["after"] = measured.record(cfg, recipe.block_size)
    return Trained(student, state, measured, results)


@dataclass(frozen=True, eq=False)
class _Stages:
    windows: Int[np.ndarray, "Q T"]
    recipe: LteRecipe
    folder: Path
    save_every: int
    report: Report

    def run(self, name: str, loss: Loss, trained: Params, fixed: Params, steps: int) -> Params:
        """What `trained` is after the steps."""
        batches = self._batches(fixed, steps, skip=self.recipe.steps if name == "stage-2" else 0)

        def of_stage(what: str, done: int, total: int, note: str = "") -> None:
            self.report(f"{name} {what}", done, total, note=note)

        state = fit(
            loss, trained, transform(self.recipe, steps), batches, steps=steps,
            folder=self.folder / name, seed=self.recipe.seed, save_every=self.save_every,
            report=of_stage,
        )  # fmt: skip
        return state.params

    def _batches(self, fixed: Params, steps: int, skip: int) -> Callable[[int], Any]:
        recipe, windows = self.recipe, self.windows
        per_epoch = max(len(windows) // recipe.batch, 1)

        def batch(step: int) -> dict[str, Any]:
            epoch, place = divmod(step + skip, per_epoch)
            order = np.random.default_rng((recipe.seed, epoch)).permutation(len(windows))
            rows = order[place * recipe.batch : (place + 1) * recipe.batch]
            grown = (step + 1) / steps if recipe.ramp else 1.0
            return {
                "tokens": jnp.asarray(windows[rows]), "fixed": fixed,
                "separation": jnp.float32(recipe.separation * grown),
            }  # fmt: skip

        return batch


def transform(recipe: LteRecipe, steps: int) -> optax.GradientTransformation:
    """Adam for the model and, clipped apart from it, for the routers; plain descent for eta."""

    def adam(rate: float) -> optax.GradientTransformation:
        warmup = max(round(WARMUP * steps), 1)
        schedule = optimizers.warmup_stable_decay(
            rate, steps, warmup=warmup, decay=(steps - warmup) / steps
        )
        return optimizers.adamw(schedule, weight_decay=0.0, clip=CLIP, b2=0.999)

    kinds: dict[Hashable, optax.GradientTransformation] = {
        "model": adam(recipe.learning_rate),
        "routers": adam(recipe.learning_rate * recipe.router_rate),
        "eta": optax.sgd(STEERING_RATE),
    }
    named = {"routers": "routers", "log_eta": "eta"}
    return optax.multi_transform(
        kinds, lambda params: {name: named.get(name, "model") for name in params}
    )


def _orders(
    model: Model, recipe: LteRecipe, path: Path, report: Report
) -> tuple[Int[np.ndarray, " F"], ...]:
    """The order of the neurons of every layer, in groups."""
    layers = model.params["layers"]
    if recipe.method == "dense" or not recipe.grouped:
        return tuple(np.arange(model.config.intermediate_size, dtype=np.int32) for _ in layers)
    if not path.is_file():
        orders = []
        for index, layer in enumerate(layers):
            weights = input_weights(layer["mlp"])
            orders.append(group_neurons(weights, recipe.block_size, seed=recipe.seed).order)
            report("grouping", index + 1, len(layers))
        write_arrays(path, {"orders": np.stack(orders)})
    return tuple(read_arrays(path)["orders"])
