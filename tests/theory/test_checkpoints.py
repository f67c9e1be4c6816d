"""A training's checkpoints: measured one at a time, resumed, and refused in one line."""

import json
import shutil
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cli import main
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.models.params import init_params
from jaxinfer.theory import checkpoints
from jaxinfer.theory.checkpoints import drop_and_rebound, measure_checkpoints, snapshots_in
from tests.cli.conftest import byte_tokenizer
from tests.factories import BASE, params_of

CFG = replace(BASE, vocab_size=258, bos_token_id=256, eos_token_ids=(257,))
STEPS = {0: 0.0, 10: 5.0, 200: 1.5}  # how loud queries are: attention is uniform, sharp, less so
TEXT = "".join(chr(97 + (7 * i * i + i) % 26) for i in range(200))
WINDOW = 32


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A folder with checkpoints of three steps, and one that holds none."""

    folder = tmp_path_factory.mktemp("training")
    params = init_params(CFG, jax.random.key(0))
    for step, scale in STEPS.items():
        layers = tuple(
            layer | {"attn": layer["attn"] | {"q": {"weight": scale * loud["attn"]["q"]["weight"]}}}
            for layer, loud in zip(params["layers"], params_of("llama")["layers"], strict=True)
        )
        made = Checkpoint(CFG, params | {"layers": layers}, byte_tokenizer(None), {"step": step})
        save_checkpoint(folder / f"part-{'abc'[len(list(folder.iterdir()))]}", made)
    (folder / "logs").mkdir()
    return folder


def measured(folder, run, **options):
    return measure_checkpoints(snapshots_in(folder), TEXT, run, window=WINDOW, **options)


def test_attention_that_drops_and_comes_back_is_seen(training, tmp_path):
    found = measured(training, tmp_path)
    assert found.steps.tolist() == list(STEPS)
    entropy = found.by_layer("relative_entropy")
    # Queries of zeros: all but the first, which sees one key, spread their attention evenly.
    np.testing.assert_allclose(entropy[0], (WINDOW - 1) / WINDOW, atol=1e-5)
    for layer, one in enumerate(found.rebounds("relative_entropy")):
        assert one.step == 10 and one.lowest == entropy[1, layer] < one.last < one.first
        expected = (one.last - one.lowest) / (one.first - one.lowest)
        assert one.rebound == pytest.approx(expected) and 0 < one.rebound < 1
    for name in ("stable_rank.q", "stable_rank.qk", "effective_rank.qk"):
        assert (found.measures[name][0] == 0).all() and (found.measures[name][1:] >= 1).all()
    assert (found.measures["stable_rank.up"] == found.measures["stable_rank.up"][0]).all()


def test_a_number_that_only_rises_has_no_rebound():
    one = drop_and_rebound(np.arange(3), np.array([1.0, 2.0, 3.0]))
    assert one.step == 0 and np.isnan(one.rebound)
    nothing = drop_and_rebound(np.arange(2), np.full(2, np.nan))
    assert np.isnan(nothing.lowest) and np.isnan(nothing.rebound)


def test_one_checkpoint_is_in_memory_and_a_kill_costs_one(training, tmp_path, monkeypatch):
    whole = measured(training, tmp_path / "whole")
    alive, loads = [], []

    class Killed(Exception):
        pass

    def load(folder, dtype):
        assert not any(ref() is not None for ref in alive), "the one before is still there"
        if len(loads) == 2:
            loads.append("killed")
            raise Killed
        found = load_checkpoint_folder(folder, dtype)
        alive.append(weakref.ref(found.params["layers"][0]["attn"]["q"]["weight"]))
        loads.append(folder.name)
        return found

    load_checkpoint_folder = checkpoints.load_checkpoint_folder
    monkeypatch.setattr(checkpoints, "load_checkpoint_folder", load)
    with pytest.raises(Killed):
        measured(training, tmp_path / "run")
    again = measured(training, tmp_path / "run")
    assert loads == ["part-a", "part-b", "killed", "part-c"]
    for name, expected in whole.measures.items():
        np.testing.assert_array_equal(again.measures[name], expected)
    measured(training, tmp_path / "run")
    assert len(loads) == 4  # nothing is measured twice


def test_a_checkpoint_that_was_replaced_is_measured_again(training, tmp_path):
    folder = tmp_path / "training"
    shutil.copytree(training, folder)
    before = measured(folder, tmp_path / "run")
    shutil.rmtree(folder / "part-b")
    shutil.copytree(folder / "part-c", folder / "part-b")
    (folder / "part-b" / "provenance.json").write_text('{"step": 10}')
    after = measured(folder, tmp_path / "run")
    np.testing.assert_array_equal(after.measures["sink_mass"][1], before.measures["sink_mass"][2])


def test_the_command_prints_json_and_draws(training, tmp_path, capsys):
    text, picture = tmp_path / "text", tmp_path / "dynamics.png"
    text.write_text(TEXT)
    command = ["dynamics", "--checkpoints", str(training), "--text", str(text), "--run-dir",
               str(tmp_path / "run"), "--window", str(WINDOW), "--plot", str(picture)]  # fmt: skip
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == list(STEPS) and found["checkpoints"] == ["part-a", "part-b", "part-c"]
    assert np.asarray(found["measures"]["sink_mass"]).shape == (3, 2, 4)
    assert found["rebounds"]["relative_entropy"][0]["step"] == 10
    assert found["rebounds"]["stable_rank.up"][0]["rebound"] is None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert "relative_entropy" in capsys.readouterr().out


def refused(capsys, folder, text, run, *options):
    """What the command says to bad input, which is one line."""
    code = main(
        ["dynamics", "--checkpoints", str(folder), "--text", str(text), "--run-dir", str(run),
         "--window", str(WINDOW), *options]
    )  # fmt: skip
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not out and len(lines) == 1
    return lines[0]


def test_bad_folders_and_texts_are_refused_in_one_line(training, tmp_path, capsys):
    text, run = tmp_path / "text", tmp_path / "run"
    text.write_text(TEXT)
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoints in" in refused(capsys, tmp_path / "empty", text, run)
    assert "is no folder" in refused(capsys, tmp_path / "none", text, run)
    assert "No such file" in refused(capsys, training, tmp_path / "none", run)
    short = tmp_path / "short"
    short.write_text("a few words")
    message = refused(capsys, training, short, run)
    assert f"the text has 11 tokens, less than a window of {WINDOW}" in message
    assert not run.exists()
    measured(training, run)
    assert "started with other tokens" in refused(capsys, training, text, run, "--windows", "2")


@pytest.fixture
def copied(training, tmp_path):
    """A copy of the training to spoil, and a text."""
    shutil.copytree(training, tmp_path / "training")
    (tmp_path / "text").write_text(TEXT)
    return tmp_path / "training", tmp_path / "text", tmp_path / "run"


def test_checkpoints_of_different_models_are_refused(copied, capsys):
    folder = copied[0]
    path = folder / "part-b" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["norm_eps"] = 0.5
    path.write_text(json.dumps(config))
    message = refused(capsys, *copied)
    assert "'part-a' and 'part-b' are of different models, with another norm_eps" in message
    config["model"] = 3
    path.write_text(json.dumps(config))
    assert "config.json lacks the object 'model'" in refused(capsys, *copied)


def test_two_checkpoints_of_a_step_are_refused(copied, capsys):
    shutil.copytree(copied[0] / "part-b", copied[0] / "part-d")
    assert "'part-b' and 'part-d' are both of step 10" in refused(capsys, *copied)
    (copied[0] / "part-d" / "provenance.json").unlink()
    assert "'part-d' does not say its step" in refused(capsys, *copied)
    (copied[0] / "part-d").rename(copied[0] / "part-10")
    assert "are both of step 10" in refused(capsys, *copied)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_when_it_is_gone(copied, capsys):
    folder, text, run = copied
    for path in (folder / "part-b" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 64:
            path.write_bytes(path.read_bytes()[:64])
    assert "checkpoint 'part-b': " in refused(capsys, *copied)
    assert [path.name for path in (run / "measures").iterdir()] == ["0.npz"]
    shutil.rmtree(folder / "part-b")
    assert measured(folder, run).steps.tolist() == [0, 200]


def test_a_model_whose_numbers_are_not_finite_is_named(copied, capsys):
    params = init_params(CFG, jax.random.key(0))
    params["layers"][1]["mlp"]["up"]["weight"] *= jnp.float32(1e30)
    params["layers"][1]["mlp"]["gate"]["weight"] *= jnp.float32(1e30)
    made = Checkpoint(CFG, params, byte_tokenizer(None), {"step": 10})
    save_checkpoint(copied[0] / "part-b", made, overwrite=True)
    assert "'part-b': layer 1 gives numbers that are not finite" in refused(capsys, *copied)


def test_options_of_checkpoints_go_together(training, tmp_path, capsys):
    for options, message in (
        (["--checkpoints", str(training)], "--checkpoints goes with --text FILE and --run-dir"),
        (["--mu", "1,2", "--text", "x"], "--text and --run-dir are for checkpoints"),
    ):
        assert main(["dynamics", *options]) == 2
        assert message in capsys.readouterr().err
    message = refused(capsys, training, "x", tmp_path / "r", "--mu", "1")
    assert "without --mu and --delta" in message
