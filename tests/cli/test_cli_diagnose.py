"""`jaxinfer diagnose`: a policy file that the other verbs take, found again, and refused in one
line."""

import json
import random

import pytest

from jaxinfer.theory.diagnose import diagnosis

WINDOW = 40
TEXT = "".join(chr(97 + (7 * i * i + i) % 26) for i in range(3 * WINDOW))
CANDIDATES = "kivi4:group=8:residual=8,streaming:window=6:sinks=2,full"


@pytest.fixture
def command(plain_model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.write_text(TEXT)
    return [
        "diagnose", plain_model, "--text", str(text), "--window", str(WINDOW), "--windows", "2",
        "--points", "32", "--candidates", CANDIDATES,
    ]  # fmt: skip


def test_a_choice_is_saved_used_and_made_again_without_measuring(
    command, plain_model, run, tmp_path, monkeypatch
):
    path = tmp_path / "policy.json"
    first = run(*command, "--budget", "0.4", "--save", str(path), "--json")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert found["candidates"] == CANDIDATES.split(",") and len(found["policies"]) == 2
    assert found["bytes"] <= found["budget"] == int(0.4 * found["full_bytes"])
    assert found["length"] == WINDOW and len(found["errors"]["keys.r_rho"]) == 2
    saved = json.loads(path.read_text())
    assert saved["diagnosis"]["bytes"] == found["bytes"] and saved["diagnosis"]["by"] == "output"
    names = [one.split(":")[0] for one in found["policies"]]
    assert [one["name"] for one in saved["layers"]] == names

    text = command[3]
    score = run("score", text, "--model", plain_model, "--policy", str(path), "--max-tokens",
                str(WINDOW), "--json")  # fmt: skip
    assert score.code == 0, score.err
    assert json.loads(score.out)["policy"] == "per-layer"

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(diagnosis, "walk", never)
    more = run(*command, "--budget", str(found["full_bytes"]), "--by", "r_rho", "--json")
    assert json.loads(more.out)["policies"] == ["full", "full"]
    table = run(*command, "--budget", "0.4", "--by", "entropy")
    assert table.code == 0 and "predicted loss" in table.out and "(entropy)" in table.out
    again = run(*command, "--budget", "0.4", "--save", str(path))
    assert again.code == 2 and "--force" in again.err
    assert run(*command, "--budget", "0.4", "--save", str(path), "--force").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "--budget must be whole bytes, or a share"),
        (["--budget", "1.5"], "--budget must be whole bytes, or a share"),
        (["--budget", "nan"], "--budget must be whole bytes, or a share"),
        (["--budget", "30%"], "--budget must be whole bytes, or a share"),
        (["--budget", "0.5", "--by", "norm"], "--by must be one of"),
        (["--budget", "0.5", "--save", "policy"], "--save must end in .json"),
        (["--budget", "0.5", "--candidates", "kivi9"], "unknown cache policy 'kivi9'"),
        (["--budget", "0.5", "--candidates", ","], "there are no candidates"),
        (["--budget", "100", "--save", "p.json"], "a budget of 100 bytes is below the 2"),
        (["--budget", "0.5", "--window", "4000"], "has 120 tokens, less than a window of 4000"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(
    command, options, message, run, tmp_path
):
    result = run(*command, *options)
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and not result.out and len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["text"]
    assert not (tmp_path / "cache" / "diagnose").exists()


def test_calibration_ranks_texts(plain_model, run, tmp_path):
    letters = {"own": "abc ", "near": "abc d", "far": "XYZ0123"}
    for seed, (name, some) in enumerate(letters.items()):
        (tmp_path / name).write_text("".join(random.Random(seed).choices(some, k=200)))
    own, near, far = (str(tmp_path / name) for name in letters)
    command = ["diagnose", plain_model, "--text", own, "--window", "40", "--points", "32"]
    both = ["--calibration", far, "--calibration", near]
    found = run(*command, *both, "--json")
    assert found.code == 0, found.err
    ranked = json.loads(found.out)["nearest"]
    assert [one["name"] for one in ranked] == [near, far]
    assert ranked[0]["value"] < ranked[1]["value"] and 0 < ranked[1]["p_value"] <= 1
    for options, message in (
        ([], "give --budget, or texts to compare with --calibration"),
        ([*both, "--budget", "0.5"], "--calibration goes without --budget"),
        ([*both, "--calibration", far], "given to --calibration twice"),
        (["--calibration", str(tmp_path / "none")], "No such file"),
    ):
        refused = run(*command, *options)
        assert refused.code == 2 and message in refused.err and not refused.out
