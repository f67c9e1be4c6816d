"""The fuzzer finds planted faults of every kind, and none in the parsers of the library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import planted
from tools.fuzz import limits, run
from tools.fuzz.run import fuzz, keep, planned, replayed
from tools.fuzz.worker import Bench, Input

ROOT = Path(__file__).parents[2]


def error_of(tmp_path, parse):
    bench = Bench(tmp_path, [planted.target(parse)])
    return bench.try_out(parse.__name__, "a.json", b"damaged")


@pytest.mark.parametrize(
    "parse, error",
    [
        (planted.foreign, "a foreign JSONDecodeError"),
        (planted.traceback, "KeyError at planted.py"),
        (planted.escape, "a message that is no line"),
        (planted.long, "a message that is no line"),
    ],
)
def test_what_is_no_line_of_refusal_is_found(tmp_path, parse, error):
    assert error_of(tmp_path, parse).startswith(error)


def test_a_hang_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    assert error_of(tmp_path, planted.hang).startswith("Hang")


def test_a_line_of_refusal_is_no_finding(tmp_path):
    assert error_of(tmp_path, planted.refuses) is None


def test_the_end_of_a_process_is_found_and_the_next_input_is_read(tmp_path):
    targets = [planted.target(planted.abort), planted.target(planted.memory)]
    found = [finding for _, finding in fuzz(targets, 4, 0, processes=1) if finding is not None]
    kinds = {(one.input.target, one.error.split(" at ")[0]) for one in found}
    assert kinds == {("abort", "the process ended with -6"), ("memory", "MemoryError")}
    places = [keep(one, 0, tmp_path, targets) for one in found if one.input.target == "memory"]
    assert json.loads((places[0] / "finding.json").read_text())["file"] == "a.json"
    mended = [planted.target(planted.abort), planted.Target("memory", planted.make, print)]
    assert replayed(places[0], mended) is None


def test_a_process_that_waits_is_ended(monkeypatch):
    monkeypatch.setattr(run, "SILENCE", 1.0)
    results = fuzz([planted.target(planted.wait)], 1, 0, processes=1)
    assert [one.error for _, one in results if one is not None] == ["no answer after 1.0 s"]


def test_an_input_follows_from_the_seed_its_parser_and_its_number(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    benches = [
        Bench(tmp_path / name, [planted.target(planted.refuses)]) for name in ("first", "second")
    ]
    one = Input("refuses", 7)
    assert benches[0].draw(3, one) == benches[1].draw(3, one) != benches[0].draw(4, one)


def test_inputs_are_shared_by_weight():
    targets = [planted.target(planted.refuses), planted.Target("more", print, print, share=30)]
    counts = [one.target for one in planned(targets, 400)]
    assert counts.count("more") == 300 and counts.count("refuses") == 100


def test_no_parser_has_a_fault_that_the_short_run_finds(tmp_path):
    command = [sys.executable, "-m", "tools.fuzz", "--inputs", "1500", "--seed", "1"]
    command += ["--findings", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
