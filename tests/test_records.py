"""Records survive a broken write, and say where they were measured."""

import json
import math
import platform
import subprocess

import pytest

from jaxinfer.environment import environment
from jaxinfer.records import Record, append, latest, read_records


def record(**changes) -> Record:
    fields = {"name": "decode", "config": {"batch": 1}, "metrics": {"a": 1.0}, "env": {}}
    return Record(**{**fields, "command": "python -m bench decode", "seed": 0, **changes})


def test_records_are_read_back_in_order(tmp_path):
    first, second = record(), record(seed=1)
    append(first, tmp_path)
    append(second, tmp_path)
    assert read_records(tmp_path) == [first, second]


def test_record_after_a_killed_write_starts_a_new_line(tmp_path):
    path = append(record(), tmp_path)
    with path.open("a") as file:
        file.write('{"name": "dec')
    append(record(seed=2), tmp_path)
    assert [r.seed for r in read_records(tmp_path)] == [0, 2]


def test_records_are_strict_json_with_every_field():
    line = record(metrics={"bad": math.nan, "rows": [math.inf, 1.23456789]}).to_json()
    data = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert data["metrics"] == {"bad": None, "rows": [None, 1.23457]}
    assert set(data) == {"name", "config", "metrics", "env", "command", "seed", "time"}


def test_latest_keeps_one_record_for_each_config():
    old, new, other = record(), record(metrics={"a": 2.0}), record(config={"batch": 8})
    assert latest([old, other, new]) == [new, other]


def test_environment_names_versions_and_machine_but_no_host_or_path():
    env = environment()
    assert {"python", "jax", "jaxlib", "numpy", "torch", "transformers", "cpu", "cores"} <= set(env)
    text = json.dumps(env)
    assert "/" not in env["python"] + str(env["commit"])
    assert platform.node() not in text or len(platform.node()) < 4


def test_no_commit_is_named_outside_a_checkout(tmp_path, monkeypatch):
    import jaxinfer.environment as module

    assert module.commit() is not None
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.commit() is None


@pytest.mark.parametrize("place", ["jaxinfer", "pallas_kernels", "tools", "checkpoints", "bench"])
def test_a_record_says_when_what_it_rests_on_was_changed(tmp_path, monkeypatch, place):
    import jaxinfer.environment as module

    for folder in (place, "bench/results", "docs"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "kept").write_text("1")
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    clean = module.commit()
    assert clean is not None and not clean.endswith("+")
    (tmp_path / "docs" / "page.md").write_text("2")
    (tmp_path / "bench" / "results" / "new.jsonl").write_text("2")
    assert module.commit() == clean
    (tmp_path / place / "kept").write_text("2")
    assert module.commit() == clean + "+"
