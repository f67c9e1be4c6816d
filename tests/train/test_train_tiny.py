"""The script behind `checkpoints/tiny-llama`: tokenizer, options, very small runs end to end."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.config import ModelConfig
from jaxinfer.hyena_config import HyenaConfig
from jaxinfer.io.load import load_checkpoint
from jaxinfer.models.params import init_params, leaf_path
from jaxinfer.models.registry import config_from_hf, family_for
from jaxinfer.models.stack import forward
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.texts import write_source
from jaxinfer.train.data import TokenWindows
from jaxinfer.train.loop import read_log
from tools.data import train_tiny
from tools.data.tiny_card import parameters_digest

ROOT = Path(__file__).parents[2]
SENTENCES = [
    "In the beginning was a small model, and the model had 96 entries.",
    "It read what it was given; it knew no more than that.",
    "Chapter 7: of naïve tokens — and of tabs\tand lines.\n\nThe end",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_tiny.train_tokenizer(iter(SENTENCES * 20), 400, path)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens_and_the_end_is_token_zero(tokenizer):
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]
    assert tokenizer.token_to_id(train_tiny.END) == 0


def test_held_out_and_skipped_documents_are_not_trained_on(tmp_path):
    write_source(tmp_path, "kjv", [("Genesis", "kept"), ("Romans", "held out")])
    write_source(tmp_path, "brown", [("ca01", "kept too"), ("ck01", "held out")])
    texts = [text for _, text in train_tiny.training_documents(tmp_path, ["kjv", "brown"])]
    assert texts == ["kept\n", "kept too\n"]


def test_the_defaults_are_the_recipe_of_the_committed_model():
    record = json.loads((ROOT / "checkpoints" / "tiny-llama" / "provenance.json").read_text())
    parameters = inspect.signature(train_tiny.main).parameters
    defaults = {name: parameters[name].default for name in train_tiny.COMMAND_OPTIONS}
    # the record is older than these choices, and its card says Muon
    newer = {"architecture": "llama", "optimizer": "muon", "schedule": "wsd", "l1": 0.0, "ramp": 0}
    newer |= {"activation": None}
    assert defaults == newer | {name: record[name] for name in defaults if name in record}
    sizes = (defaults[name] for name in ("architecture", "vocab", "width", "layers", "context"))
    stored = json.loads((ROOT / "checkpoints" / "tiny-llama" / "config.json").read_text())
    assert train_tiny.model_config(*sizes) == ModelConfig.from_dict(stored["model"])


def test_the_opt_is_the_reference_s_opt():
    """The configuration, and the logits at every position, offset by two, of random parameters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = train_tiny.model_config("opt", 96, 64, 2, 24)
    assert (cfg.num_heads, cfg.intermediate_size, cfg.position_offset) == (2, 512, 2)
    hf = transformers.OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=512, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, word_embed_proj_dim=64, eos_token_id=0, bos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    read = config_from_hf(json.loads(json.dumps(hf.to_dict())))
    assert dataclasses.replace(read, bos_token_id=None) == cfg
    params = init_params(cfg, jax.random.key(0))
    rng = np.random.default_rng(0)  # biases are zero and scales one at first, which would hide much
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), params)
    sources = family_for("opt").sources(cfg)
    paths = jax.tree_util.tree_leaves_with_path(params)
    state = {
        f"model.decoder.{sources[leaf_path(path)].name}": torch.from_numpy(np.array(leaf))
        for path, leaf in paths
    }
    model = transformers.AutoModelForCausalLM.from_config(hf).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    tokens = rng.integers(2, 96, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    got = np.asarray(forward(cfg, params, jnp.asarray(tokens, jnp.int32)).logits)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_l1_needs_activations_that_can_be_zero(tmp_path):
    with pytest.raises(typer.BadParameter, match="--l1 0.5 needs --architecture opt"):
        train(tmp_path, l1=0.5)
    assert not (tmp_path / "run").exists()


def test_an_opt_without_nonlinearity_has_linear_blocks(tmp_path):
    cfg = train_tiny.model_config("opt", 64, 32, 1, 16, "identity")
    layer = init_params(cfg, jax.random.key(0))["layers"][0]["mlp"]
    x, y = np.random.default_rng(0).standard_normal((2, 1, 3, 32)).astype(np.float32)

    def block(x):
        return np.asarray(feed_forward(cfg, layer, jnp.asarray(x), 0))

    zero = block(np.zeros_like(x))
    np.testing.assert_allclose(block(x + y) + zero, block(x) + block(y), atol=1e-5)
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(typer.BadParameter, match="--activation is that of an OPT's blocks"):
        train_tiny.main(tmp_path / "run", activation="identity")
    assert not (tmp_path / "run").exists()


def test_a_full_run_makes_twelve_snapshots():
    steps = train_tiny.log_spaced(3000)
    assert len(steps) == 12 and steps[:4] == [0, 5, 10, 20] and steps[-2:] == [2560, 3000]


def test_snapshot_steps_are_shared_by_runs_of_any_length():
    short, long = train_tiny.log_spaced(300), train_tiny.log_spaced(1200)
    assert short[0] == 0 and short[-1] == 300
    assert set(short[:-1]) <= set(long)


def test_a_run_refuses_other_options_but_a_new_length_before_the_decay(tmp_path):
    options = {"steps": 1000, "width": 128, "schedule": "wsd"}
    train_tiny.check_options(tmp_path, options)
    (tmp_path / "state" / "600").mkdir(parents=True)
    train_tiny.check_options(tmp_path, options | {"steps": 800})
    with pytest.raises(typer.BadParameter, match="steps"):
        train_tiny.check_options(tmp_path, options | {"steps": 700})
    with pytest.raises(typer.BadParameter, match="width"):
        train_tiny.check_options(tmp_path, options | {"steps": 800, "width": 64})
    assert not list(tmp_path.glob("*.part"))


def test_a_cosine_run_keeps_its_length(tmp_path):
    options = {"steps": 1000, "schedule": "cosine"}
    train_tiny.check_options(tmp_path, options)
    with pytest.raises(typer.BadParameter, match="steps"):
        train_tiny.check_options(tmp_path, options | {"steps": 900})


def test_a_write_that_fails_leaves_the_recorded_options(tmp_path, monkeypatch):
    train_tiny.check_options(tmp_path, {"steps": 1000, "schedule": "wsd"})
    before = (tmp_path / "options.json").read_text()

    def refuse(*paths):
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="killed here"):
        train_tiny.check_options(tmp_path, {"steps": 900, "schedule": "wsd"})
    assert (tmp_path / "options.json").read_text() == before


def test_snapshots_that_a_resumed_run_has_passed_are_named(tmp_path, capsys):
    run, snapshots = tmp_path / "run", tmp_path / "snapshots"
    train_tiny.warn_of_lost_snapshots(run, snapshots, 3000)
    (run / "state" / "20").mkdir(parents=True)
    (snapshots / "step-000005").mkdir(parents=True)
    assert capsys.readouterr().err == ""
    train_tiny.warn_of_lost_snapshots(run, snapshots, 3000)
    assert "at step 20 already, so there will be no snapshots of steps 0, 10;" in (
        capsys.readouterr().err
    )


def write_texts(folder):
    books = [("Genesis", " ".join(SENTENCES * 40)), ("Romans", " ".join(SENTENCES * 4))]
    write_source(folder, "kjv", books)
    return folder


TINY = {
    "batch": 2,
    "context": 32,
    "short": 16,
    "width": 32,
    "layers": 1,
    "vocab": 320,
    "peak": 1e-2,
    "log_every": 1,
    "eval_windows": 4,
}


def train(tmp_path, **options):
    """Runs the script's `main` in this process, with its own defaults for the rest."""
    parameters = inspect.signature(train_tiny.main).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    folders = {"run_dir": tmp_path / "run", "texts": write_texts(tmp_path / "texts")}
    train_tiny.main(**(defaults | TINY | folders | options))
    return read_log(tmp_path / "run")


@pytest.mark.slow
def test_a_small_run_writes_a_model_its_card_and_its_snapshots(tmp_path):
    train(tmp_path, steps=12, save_every=6, out=tmp_path / "model", snapshots=tmp_path / "all")
    checkpoint = load_checkpoint(tmp_path / "model", dtype="bfloat16")
    assert checkpoint.config.num_layers == 1
    text = SENTENCES[1]
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode(text)) == text
    card = (tmp_path / "model" / "README.md").read_text()
    assert parameters_digest(checkpoint.params) in card and "| kjv | 1 |" in card
    assert "--optimizer muon --schedule wsd" in card and "12 steps, Muon," in card
    steps = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert steps == ["step-000000", "step-000005", "step-000010", "step-000012"]
    assert json.loads((tmp_path / "run" / "heldout.json").read_text())["kjv"]["documents"] == 1


def test_an_opt_interrupted_and_started_again_goes_on_equally(tmp_path, monkeypatch):
    # three steps of a growing L1, the middle one of which never came
    options = {"architecture": "opt", "steps": 3, "l1": 2.0, "ramp": 2, "save_every": 1}
    options["optimizer"] = "adamw"  # compiles in half the time
    straight = train(tmp_path / "straight", **options)
    batch = TokenWindows.batch

    def interrupted(windows, step):
        if step == 1:
            raise KeyboardInterrupt
        return batch(windows, step)

    with monkeypatch.context() as patch:
        patch.setattr(TokenWindows, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", **options)
    assert train_tiny.saved_step(tmp_path / "killed" / "run") == 1
    assert train(tmp_path / "killed", **options, out=tmp_path / "killed" / "model") == straight
    weights = [(line["loss"] - line["nats"]) / line["l1"] for line in straight]
    np.testing.assert_allclose(weights, [0.0, 1.0, 2.0], atol=1e-4)
    assert all(0 < line["density_0"] < 1 for line in straight)
    assert_card_and_folder_agree(tmp_path / "killed" / "model", straight)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multihyena", "hyena"])
def test_a_hyena_is_a_llama_with_other_mixers(tmp_path, kind):
    """It learns, and comes back from its folder with filters as they were trained."""
    options = {"architecture": kind, "optimizer": "adamw", "steps": 6, "save_every": 6}
    log = train(tmp_path, **options, out=tmp_path / "model")
    assert log[-1]["loss"] < log[0]["loss"]
    stored = load_checkpoint(tmp_path / "model", dtype="float32")
    llama = train_tiny.model_config("llama", 320, 32, 1, 32)
    assert stored.config == dataclasses.replace(
        llama, family="hyena", rope=None, positions="none", mixers=("hyena",),
        hyena=HyenaConfig(head_size=8 if kind == "multihyena" else 1),
    )  # fmt: skip
    card = (tmp_path / "model" / "README.md").read_text()
    assert parameters_digest(stored.params) in card and f"--architecture {kind}" in card
    named = {"multihyena": "A MultiHyena of", "hyena": "A Hyena of"}[kind]
    assert named in card and "no positions but the filters' lags" in card


def assert_card_and_folder_agree(folder, log):
    """The model comes back from int8 rows as its card's hash says; densities are told."""
    stored = load_checkpoint(folder, dtype="float32")
    card = (folder / "README.md").read_text()
    assert parameters_digest(stored.params) in card
    assert json.loads((folder / "config.json").read_text())["int8_rows"] is True
    assert f"final loss {np.mean([line['nats'] for line in log]):.3f}" in card
    assert "L1 on activations growing to 2 within 2 steps" in card
    held_out = json.loads((folder / "provenance.json").read_text())["held_out"]["kjv"]
    assert f"held-out, % | {100 * held_out['density'][0]:.1f} |" in card
    assert "--architecture opt" in card and "learned positions" in card


@pytest.mark.slow
def test_snapshots_asked_for_late_are_made_from_there_on(tmp_path, capsys):
    train(tmp_path, steps=12)
    train(tmp_path, steps=12, snapshots=tmp_path / "all")
    assert "there will be no snapshots of steps 0, 5, 10;" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["step-000012"]


@pytest.mark.slow
def test_the_script_killed_and_started_again_makes_the_same_model(tmp_path):
    # with AdamW, clipping and a cosine, which the other tests leave out
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    options += ["--steps=60", "--save-every=5", "--optimizer=adamw", "--schedule=cosine"]
    options += [f"--texts={write_texts(tmp_path / 'texts')}"]

    def start(name):
        folders = [f"--run-dir={tmp_path / name}", f"--out={tmp_path / 'models' / name}"]
        command = [
            sys.executable,
            str(ROOT / "tools" / "data" / "train_tiny.py"),
            *options,
            *folders,
        ]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def finish(process):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors

    killed = start("killed")
    log = tmp_path / "killed" / "log.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") > 12):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9 and train_tiny.saved_step(tmp_path / "killed") < 60
    finish(start("killed"))
    finish(start("straight"))
    assert log.read_bytes() == (tmp_path / "straight" / "log.jsonl").read_bytes()
    both = [load_checkpoint(tmp_path / "models" / n, "bfloat16") for n in ("killed", "straight")]
    jax.tree.map(np.testing.assert_array_equal, both[0].params, both[1].params)
    losses = [line["loss"] for line in read_log(tmp_path / "straight")]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert not any("part" in name or "writing" in name for name in left)
