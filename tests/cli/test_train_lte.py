"""`jaxinfer train lte`: refused before any work, and from texts to an artefact."""

import json

import numpy as np
import pytest

from jaxinfer.io.sparsity import load_sparsity
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.texts import write_source

WORDS = "the sea was calm and the ship came home before the night with all of her men"
REFUSED = {
    "another preset": (("--preset", "best"), "preset must be one of 'ste', 'paper'"),
    "no density": (("--preset", "random"), "give target_density"),
    "blocks that do not divide": (("--block-size", "20"), "cannot be cut into blocks of 20"),
    "a density above 1": (("--target-density", "1.5"), "target_density must be a number from"),
}


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    text = [" ".join(rng.choice(WORDS.split(), 400)) for _ in range(4)]
    write_source(tmp_path, "brown", zip(("ca01", "ca02", "cd01", "ck01"), text, strict=True))
    return str(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(run, model, tmp_path, name):
    more, message = REFUSED[name]
    out = tmp_path / "out"
    found = run("train", "lte", model, "--out", str(out), "--run-dir", str(tmp_path / "r"), *more)
    assert found.code == 2 and message in found.err and found.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["mlp", "adapters"])
def test_from_texts_to_an_artefact(run, lm, model, texts, tmp_path, trainable):
    out = tmp_path / "out"
    found = run(
        "train", "lte", model, "--out", str(out), "--run-dir", str(tmp_path / "run"),
        "--texts", texts, "--source", "brown", "--windows", "8", "--context", "32",
        "--held-out", "4", "--steps", "4", "--adapt-steps", "2", "--batch", "2",
        "--block-size", "16", "--trainable", trainable, "--target-density", "0.5", "--json",
    )  # fmt: skip
    record = json.loads(found.out)
    artefact = load_sparsity(out)
    assert record["results"] == artefact.config.results
    assert artefact.config.recipe["preset"] == "ste" and artefact.config.recipe["windows"] == 8
    params = artefact.apply(lm.config, lm.params)
    assert all(isinstance(layer["mlp"], SparseMlp) for layer in params["layers"])
