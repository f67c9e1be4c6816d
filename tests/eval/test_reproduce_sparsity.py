"""Every figure of `reproduce_sparsity.py` from end to end on a toy; what the numbers are is not
looked at."""

import json
from dataclasses import replace

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.io.int8 import as_stored
from jaxinfer.io.sparsity import save_sparsity
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.identity import SparsityConfig
from jaxinfer.texts import write_source
from tests.cli.conftest import byte_tokenizer, save_model
from tests.sparsity.artefacts import layer_of
from tools.reproduce import reproduce_sparsity as figures

SIZES = {"rows": 2, "tokens": 16, "sources": "brown"}
METHODS = {"methods": "random,oracle", "densities": "0.5", "block_size": 8, "calibration": 1}
COMMANDS = {
    "quality": (
        {"new_tokens": 2, "densities": "0.5,0.25", "methods": "static,griffin"},
        ("products", "bytes", "tasks"),
    ),
    "recall": ({"methods": "random"}, ("recall",)),
    "layers": ({}, ("layers",)),
    "tokens": ({}, ("unions", "overlap")),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS if name != "tokens"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("figures") / "toy", byte_tokenizer(None)))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    words = "Some words of a text that is read, and then some more of them. " * 20
    documents = [(name, f"{name} {words}") for name in ("ca01", "cd01", "cd02")]
    write_source(tmp_path / "texts", "brown", documents)


@pytest.mark.parametrize("name", ["tokens", *SLOW])
def test_a_figure_is_written_from_end_to_end(name, model, texts, tmp_path):
    options, written = COMMANDS[name]
    folder = tmp_path / "results"
    getattr(figures, name)(model=model, folder=folder, **SIZES | METHODS | options)
    for figure in written:
        stem = f"sparsity-{figure}-toy"
        assert (folder / f"{stem}.png").stat().st_size > 1000
        assert (folder / f"{stem}.md").read_text().startswith("# ")
        record = json.loads((folder / f"eval-{stem}.jsonl").read_text())
        assert record["metrics"]["rows"] and f"reproduce_sparsity.py {name} " in record["command"]


@pytest.mark.slow
def test_the_figure_of_heads_takes_predictors_of_heads(model, texts, tmp_path):
    lm, rng = ji.load(model), np.random.default_rng(0)
    config = SparsityConfig.of(
        lm.config, fingerprint(lm.params), model="toy", block_size=4, method="deja_vu", recipe={}
    )
    both = [layer_of(rng, lm.config, config, form) for form in ("router", "heads")]
    layers = both[0], replace(both[0], heads=both[1].heads)
    save_sparsity(tmp_path / "predictors", SparsityArtefact(config, as_stored(layers)))
    figures.heads(
        model=model, method=str(tmp_path / "predictors"), shares="1,0.5", folder=tmp_path, **SIZES
    )
    rows = json.loads((tmp_path / "eval-sparsity-heads-toy.jsonl").read_text())["metrics"]["rows"]
    assert [row.get("heads") for row in rows] == [None, 1.0, 0.5]
    assert rows[1]["relative"] == pytest.approx(1, abs=1e-4) != rows[2]["relative"]


@pytest.mark.slow
def test_the_speed_of_random_routers_is_drawn(tmp_path):
    figures.speed(model="tiny-random", preset="quick", folder=tmp_path)
    record = json.loads((tmp_path / "eval-sparsity-speed-tiny-random.jsonl").read_text())
    rows = record["metrics"]["rows"]
    assert len(rows) == 4 and all(row["same_tokens_as_masked"] for row in rows)
