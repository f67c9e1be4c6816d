"""The GPU suite on a CPU: rows, exit status, and steps that take their process down."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from bench.gpu import parts
from bench.gpu.command import main
from bench.gpu.correctness_part import PROBLEMS
from bench.gpu.profile import kinds
from bench.gpu.rows import NAME, Run, rows_of
from bench.gpu.summary import checks
from bench.gpu.timing import chain
from bench.gpu.torch_part import _attention, _numbers
from jaxinfer.inspection import gpu_target
from jaxinfer.records import Record, read_records
from pallas_kernels.weight_matmul import quantize_weight, weight_matmul

ROOT = Path(__file__).parents[2]
QUICK = ["--interpret", "--quick", "--in-process", "--only"]


def test_every_check_is_a_row_with_its_error(tmp_path):
    status = main([*QUICK, "correctness", "--match", "modal_step", "--out", str(tmp_path)])
    (row,) = read_records(tmp_path)
    assert status == 0 and row.name == NAME
    assert row.config == {"part": "correctness", "op": "modal_step", "seed": 0}
    assert row.metrics["agrees"] and row.metrics["largest_error"] <= row.metrics["tolerance"]
    assert row.metrics["meaningless_times"] and row.env["device"] == "cpu" and row.env["jax"]
    assert row.seed == 0 and row.command.startswith("python bench/gpu_suite.py --quick --interpret")
    assert "| modal_step | 1 of 1 |" in (tmp_path / "suite.md").read_text()


@pytest.mark.slow
def test_all_kernels_agree_with_their_references(tmp_path):
    assert main([*QUICK, "correctness", "--out", str(tmp_path)]) == 0
    rows = read_records(tmp_path)
    assert {row.config["op"] for row in rows} == set(PROBLEMS)
    assert all(row.metrics.get("agrees") for row in rows)


@pytest.mark.parametrize(
    ("error", "tolerance", "shown"),
    [(0.25, 0.5, "0.50"), (0.0, 0.0, "0.00"), (1e-9, 0.0, "inf"), (None, 0.5, "inf")],
)
def test_the_summary_shows_the_largest_share_of_a_tolerance(error, tolerance, shown):
    metrics = {"agrees": shown != "inf", "largest_error": error, "tolerance": tolerance}
    row = Record(
        name=NAME, config={"op": "put_tokens"}, metrics=metrics, env={}, command="", seed=0
    )
    agreeing = f"{int(metrics['agrees'])} of 1"
    assert f"| put_tokens | {agreeing} | {shown} |" in checks([row])


def test_a_kernel_that_is_wrong_sets_the_exit_status(tmp_path, monkeypatch):
    from bench.gpu import correctness_part

    monkeypatch.setattr(correctness_part, "error_of", lambda found, wanted: float("nan"))
    arguments = [*QUICK, "correctness", "--match", "modal_step", "--out", str(tmp_path)]
    assert main(arguments) == 1
    (row,) = read_records(tmp_path)
    assert row.metrics["agrees"] is False and row.metrics["largest_error"] is None


def test_a_step_is_timed_in_a_loop(tmp_path):
    match = '"modal_step", "part": "states"'
    assert main([*QUICK, "states", "--match", match, "--out", str(tmp_path)]) == 0
    rows = read_records(tmp_path)
    assert [row.config["peer"] for row in rows] == ["kernel", "reference"]
    for row in rows:
        m = row.metrics
        assert m["gb_per_s"] == pytest.approx(m["bytes"] / m["us"] / 1e3, rel=1e-4)
        assert m["share_of_copy"] is None  # nobody has measured a copy


def test_every_call_of_a_timed_loop_stays_in_it():
    if gpu_target.unavailable_reason():
        pytest.skip(str(gpu_target.unavailable_reason()))

    def call(state, x, w):
        out = weight_matmul(x, w, implementation="triton")
        return state, out

    x, w = jax.ShapeDtypeStruct((1, 256), "bfloat16"), jax.ShapeDtypeStruct((256, 256), "float32")
    weight = jax.eval_shape(lambda w: quantize_weight(w, 8, 64), w)

    def loop(given):
        return chain(jax.jit(call), ((),) * 3, given, rounds=5)

    text = gpu_target.compile_for(loop, ((x, weight),) * 3).as_text() or ""
    (body,) = re.findall(r", body=(\S+),", text)
    inside = text[text.index(f"\n{body} (") :].partition("\n}")[0]
    assert inside.count('"__gpu$xla.gpu.triton"') == text.count('"__gpu$xla.gpu.triton"') == 3


def test_what_there_is_no_time_for_is_a_row_that_says_so(tmp_path):
    arguments = [*QUICK, "weights", "--budget", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = read_records(tmp_path)
    assert len(rows) > 10 and {row.metrics["skipped"] for row in rows} == {"no time left"}


FAKE = """
    import os, sys, time, types
    sys.path.insert(0, {root!r})
    from bench.gpu import command, parts
    from bench.gpu.step import Plain

    def fail():
        raise ValueError("wrong")

    found = dict(good=dict, bad=fail, crash=os.abort, hang=lambda: time.sleep(100), last=dict)
    module = types.ModuleType("bench.gpu.fake_part")
    module.steps = lambda run: [Plain(dict(part="fake", op=op), f) for op, f in found.items()]
    sys.modules[module.__name__] = module
    parts.PARTS["fake"], parts.STEP_LIMIT, parts.GRACE = 1, 1, 2
    sys.exit(command.main())
"""


def test_a_step_that_crashes_or_hangs_costs_its_own_row_alone(tmp_path, monkeypatch):
    script = tmp_path / "suite.py"
    script.write_text(textwrap.dedent(FAKE.format(root=str(ROOT))))
    monkeypatch.setattr(parts, "SUITE", script)
    run = Run(out=tmp_path / "out", seed=0, quick=True, interpret=True, match="", number="1")
    parts.supervise(run, {"fake": 1.0}, 120, in_process=False)
    rows = {row.config["op"]: row.metrics for row in rows_of(run)}
    assert list(rows) == ["good", "bad", "crash", "hang", "last"]
    assert "error" not in rows["good"] and "error" not in rows["last"]
    assert rows["bad"]["error"] == "ValueError: wrong"
    assert "crashed or took too long" in rows["crash"]["error"]
    assert "crashed or took too long" in rows["hang"]["error"]
    assert [path.name for path in run.out.iterdir()] == ["suite.jsonl"]


def test_torch_reads_codes_as_the_library_does():
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    import numpy as np

    from bench.gpu.attention_part import GROUP
    from bench.gpu.correctness_part import attention, stored

    halves = stored((2, 2, 64, 32), 2, GROUP)
    q = jnp.ones((2, 2, 3, 1, 32), jnp.float32) / 8
    acc, _, norm = attention(q, *halves, bits=2, name="reference")

    def torched(x):
        kind = "int32" if x.dtype == jnp.uint32 else "float32"
        return torch.tensor(np.asarray(x).astype(kind))

    def numbers(half, axis):
        words, scale, zero = (torched(x) for x in half)
        return _numbers(words, scale, zero, 2, axis)

    k, v = numbers(halves[0], 2), numbers(halves[1], 3)
    found = _attention(torched(q.reshape(2, 6, 1, 32)), k, v)
    wanted = torched(acc / norm[..., None]).reshape(2, 6, 1, 32)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_command_runs_without_the_shape_annotations(tmp_path):
    """A bare machine has no jaxtyping; nor need it be installed there."""
    block = tmp_path / "jaxtyping_is_missing"
    block.mkdir()
    (block / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'jaxtyping' else find(name, *rest)\n"
    )
    command = [sys.executable, str(ROOT / "bench/gpu_suite.py"), "--interpret", "--quick"]
    command += ["--only", "environment", "--in-process", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(block)}, check=False)
    (row,) = read_records(tmp_path / "out")
    assert done.returncode == 0 and row.metrics["copy_gb_per_s"] > 0
    assert json.loads(row.to_json())["config"] == {"part": "environment"}


def test_launches_are_counted_by_kind():
    events = [("fusion_1", 2.0), ("add.2", 1.0), ("fusion_22", 3.0), ("kivi_attention", 0.5)]
    assert kinds(events) == {"fusion": (2, 5.0), "add": (1, 1.0), "kivi_attention": (1, 0.5)}


@pytest.mark.slow
def test_a_trained_model_gives_the_same_tokens_through_the_kernels(tmp_path):
    assert main([*QUICK, "models", "--out", str(tmp_path)]) == 0
    rows = read_records(tmp_path)
    assert [row.config["case"] for row in rows] == ["full", "kivi 2 bits"]
    assert all(row.metrics["same_tokens"] == row.metrics["tokens"] for row in rows)
