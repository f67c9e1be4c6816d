"""The tool that reads kernels' machine code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.inspection import gpu_target
from tools.kernels import inspect_kernels

TOOL = Path(inspect_kernels.__file__)
ONE = ["--only", "weight_matmul", "--config", "smollm2 up, 4 bits, 16 rows"]


def test_a_kernel_is_described_by_its_machine_code(tmp_path):
    if gpu_target.unavailable_reason():
        pytest.skip(gpu_target.unavailable_reason())
    if inspect_kernels.find_ptxas() is None:
        pytest.skip(inspect_kernels.NO_PTXAS)
    saved = tmp_path / "kernels.jsonl"
    run = subprocess.run(  # XLA reads its flags once, so not in this process
        [sys.executable, str(TOOL), *ONE, "--json", "--save", str(saved)],
        capture_output=True, text=True,
    )  # fmt: skip
    if "Unsupported .version" in run.stderr:
        pytest.skip("this ptxas is older than the PTX that XLA writes")
    assert run.returncode == 0, run.stderr
    assert saved.read_text() == run.stdout and list(tmp_path.iterdir()) == [saved]
    row = json.loads(run.stdout)
    assert (row["kernel"], row["target"]) == ("weight_matmul", "h200")
    assert 32 <= row["registers"] <= 255 and row["spill_bytes"] == 0
    assert 1024 <= row["shared_bytes"] <= 232448  # what a block of an H200 may have
    stored = 576 * 1536 * (4 + 24 / 64) / 8  # codes; a bfloat16 scale and a zero point per 64
    assert row["bytes"] == stored + 16 * (2 * 576 + 4 * 1536)
    assert row["operations"] == 2 * 16 * 576 * 1536
    assert row["floor_us"] == pytest.approx(row["bytes"] / 4.3e6, abs=1e-3)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(inspect_kernels, "find_ptxas", lambda: "ptxas")
    monkeypatch.setattr(gpu_target, "unavailable_reason", lambda: "no plugin; install it")
    with pytest.raises(SystemExit, match="cannot compile for h200: no plugin; install it"):
        inspect_kernels.main(ONE)
    monkeypatch.setattr(inspect_kernels, "find_ptxas", lambda: None)
    with pytest.raises(SystemExit, match="ptxas is not found; .* PATH"):
        inspect_kernels.main(ONE)


def test_every_kernel_of_the_list_has_cases_with_names_of_their_own():
    for cases in inspect_kernels.KERNELS.values():
        names = [(case.launch, case.config) for case in cases()]
        assert names and len(set(names)) == len(names)
