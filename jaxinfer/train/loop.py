"""`fit`: the one training loop, for any `loss(params, batch, key) -> (scalar, metrics)`.

The whole state is (step, params, opt_state, key); batches and keys are functions of the step,
so a run that is killed at any moment and started again gives bitwise the numbers of an
uninterrupted one. A folder holds `state/<step>` (Orbax, written aside and renamed, the newest
few kept), `log.jsonl` (one line per logged step, nothing that depends on time, cut back to the
step resumed from) and `speed.jsonl` (timings, appended by every attempt). Logs reach the disk
before the state that follows them.
"""

import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxinfer.files import write_text
from jaxinfer.io.orbax import writing
from jaxinfer.progress import Report, silent
from jaxinfer.typing import Json, Params

Batch: TypeAlias = Any
"""A tree of arrays, whatever the loss takes."""

Loss = Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """Everything a run needs to go on; `step` counts finished updates."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key: jax.Array  # raw key data; step s draws from fold_in(key, s)


def new_state(params: Params, transform: optax.GradientTransformation, seed: int = 0) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, transform.init(params), jax.random.PRNGKey(seed))


def make_update(loss: Loss, transform: optax.GradientTransformation):
    """`(state, batch) -> (state, metrics)`, jitted, with the old state's buffers donated."""

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(update, donate_argnums=0)


def fit(
    loss: Loss,
    params: Params,
    transform: optax.GradientTransformation,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    folder: Path,
    seed: int = 0,
    save_every: int = 500,
    keep: int = 2,
    log_every: int = 10,
    snapshots: Collection[int] = (),
    on_snapshot: Callable[[int, Params], None] | None = None,
    report: Report = silent,
) -> TrainState:
    """The state after `steps` updates, resumed from `folder` when it holds an earlier state.

    Args:
        batches: the batch of a step, a pure function of the step (0-based).
        save_every: updates between saved states; the last state is always saved.
        log_every: updates between log lines; a line holds that update's own metrics.
        report: told the last logged step and its loss.
        snapshots: step counts at which `on_snapshot(step, params)` is called; after a resume it may
            be called again with equal parameters, so it should overwrite.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if on_snapshot is None:
        if snapshots:
            raise ValueError(
                "snapshots were asked for without on_snapshot; pass a function for them"
            )
        on_snapshot = _ignore
    # Donation takes the buffers away, so the caller keeps the originals.
    state = new_state(jax.tree.map(jnp.array, params), transform, seed)
    update = make_update(loss, transform)
    with _manager(folder / "state", keep) as manager:
        if manager.latest_step() is not None:
            state = _restore(manager, state)
        start = int(state.step)
        _truncate_log(folder / "log.jsonl", start)
        if start in snapshots:
            on_snapshot(start, state.params)
        with (
            open(folder / "log.jsonl", "a", buffering=1) as log,
            open(folder / "speed.jsonl", "a", buffering=1) as speed,
        ):
            began, done = time.perf_counter(), start
            for step in range(start, steps):
                state, metrics = update(state, batches(step))
                count = step + 1
                if count % log_every == 0 or count == steps:
                    line = {"step": count} | {name: float(value) for name, value in metrics.items()}
                    log.write(json.dumps(line) + "\n")
                    seconds = time.perf_counter() - began
                    speed.write(
                        json.dumps({"step": count, "steps": count - done, "seconds": seconds})
                        + "\n"
                    )
                    began, done = time.perf_counter(), count
                    report("training", count, steps, note=f"loss {line['loss']:.3f}")
                if count in snapshots:
                    on_snapshot(count, state.params)
                if count % save_every == 0 or count == steps:
                    _flush(log)
                    speed.flush()
                    _save(manager, count, state)
    return state


def latest_state(folder: Path, like: TrainState) -> TrainState | None:
    """The newest saved state of a run, or None; `like` gives shapes and dtypes."""
    if not (Path(folder) / "state").is_dir():
        return None
    with _manager(Path(folder).absolute() / "state", None) as manager:
        return None if manager.latest_step() is None else _restore(manager, like)


def read_log(folder: Path) -> list[Json]:
    """The lines of a run's log."""
    text = (Path(folder) / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _ignore(step: int, params: Params) -> None:
    del step, params


def _manager(folder: Path, keep: int | None):
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def _save(manager, step: int, state: TrainState) -> None:
    import orbax.checkpoint as ocp

    with writing(Path(str(manager.directory))):
        manager.save(step, args=ocp.args.StandardSave(state._asdict()), force=True)
        manager.wait_until_finished()


def _restore(manager, like: TrainState) -> TrainState:
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
    step = manager.latest_step()
    return TrainState(**manager.restore(step, args=ocp.args.StandardRestore(abstract)))


def _truncate_log(path: Path, step: int) -> None:
    """Drops lines after `step` and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    write_text(path, "".join(kept))


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
