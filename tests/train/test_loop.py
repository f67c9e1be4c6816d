"""The training loop: it learns, it logs, and a killed run goes on as if nothing had happened."""

import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.train.loop import fit, latest_state, new_state, read_log
from jaxinfer.train.optimizers import adamw, warmup_cosine

PROGRAM = Path(__file__).with_name("tiny_run.py")
ROOT = PROGRAM.parents[2]


def _load_program():
    spec = importlib.util.spec_from_file_location("tiny_run", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_run = _load_program()


def _start(folder: Path, steps: int) -> subprocess.Popen:
    """The run as a process of its own, so that nothing compiled before it takes part."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROGRAM), str(folder), str(steps)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, tiny_run.run(folder, 30)


def test_the_loss_of_a_predictable_sequence_falls(straight):
    losses = [line["loss"] for line in read_log(straight[0])]
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]


def test_a_run_in_two_parts_equals_a_straight_run_bitwise(straight, tmp_path):
    tiny_run.run(tmp_path, 13)
    state = tiny_run.run(tmp_path, 30)
    _assert_same(state, straight[1])
    assert (tmp_path / "log.jsonl").read_bytes() == (straight[0] / "log.jsonl").read_bytes()


def test_a_run_killed_at_a_random_moment_resumes_bitwise(tmp_path):
    killed = _start(tmp_path, 100_000)
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size > 500):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline, "the training program made no progress"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))  # anywhere: in a step, a log line or a save
    killed.kill()
    killed.communicate()
    reached = len(log.read_text().splitlines())
    target = max(30, reached + 5)
    straight = tmp_path / "straight"
    straight.mkdir()
    for folder in (tmp_path, straight):
        run = _start(folder, target)
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    blank = jax.eval_shape(lambda: new_state(tiny_run.start(), tiny_run.transform()))
    _assert_same(latest_state(tmp_path, blank), latest_state(straight, blank))
    assert log.read_bytes() == (straight / "log.jsonl").read_bytes()


def test_a_half_written_log_line_is_dropped_on_resume(tmp_path):
    def run(steps):
        options = {"steps": steps, "folder": tmp_path, "log_every": 1}
        fit(_square, {"w": jnp.ones(3)}, optax.sgd(0.1), lambda step: None, **options)
        return (tmp_path / "log.jsonl").read_text()

    before = run(4)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    after = run(6)
    assert after.startswith(before) and len(after.splitlines()) == 6


def test_a_finished_run_is_not_trained_further(straight):
    folder, state = straight
    _assert_same(tiny_run.run(folder, 30), state)


def test_only_the_newest_states_are_kept(straight):
    names = sorted(int(path.name) for path in (straight[0] / "state").iterdir())
    assert names == [28, 30]


def test_the_latest_state_can_be_read_without_training(straight):
    folder, state = straight
    blank = new_state(jax.tree.map(jnp.zeros_like, state.params), _transform())
    _assert_same(latest_state(folder, blank), state)
    assert latest_state(folder / "nowhere", blank) is None


def _square(params, batch, key):
    return (params["w"] ** 2).sum(), {}


def _transform():
    return adamw(warmup_cosine(1e-2, 1000, warmup=10))


def test_keys_differ_between_steps_and_metrics_reach_the_log(tmp_path):
    def loss(params, batch, key):
        noise = jax.random.normal(key)
        return params["w"] * 0.0 + noise, {"batch": batch}

    seen = []
    fit(
        loss, {"w": jnp.float32(1)}, optax.sgd(0.1), lambda step: jnp.float32(step),
        steps=3, folder=tmp_path, log_every=1, snapshots=(0, 2),
        on_snapshot=lambda step, params: seen.append(step),
    )  # fmt: skip
    lines = read_log(tmp_path)
    assert [line["batch"] for line in lines] == [0.0, 1.0, 2.0]
    assert len({line["loss"] for line in lines}) == 3
    assert seen == [0, 2]


def test_a_resumed_run_snapshots_the_step_that_it_resumes_from(tmp_path):
    def run(steps, **options):
        params = {"w": jnp.ones(3)}
        fit(
            _square, params, optax.sgd(0.1), lambda s: None, steps=steps, folder=tmp_path, **options
        )

    seen = []
    run(2)
    run(3, snapshots=(0, 2, 3), on_snapshot=lambda step, params: seen.append(step))
    assert seen == [2, 3]


def test_the_given_parameters_survive_the_run(tmp_path):
    params = {"w": jnp.ones(3)}
    fit(
        _square, params, optax.sgd(0.1), lambda step: None,
        steps=2, folder=tmp_path,
    )  # fmt: skip
    np.testing.assert_array_equal(params["w"], 1.0)
