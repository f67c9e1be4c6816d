"""Every figure of `reproduce_sparsity.py` from end to end on a toy; what the numbers are is not
looked at."""

import json

import pytest

from jaxinfer.texts import write_source
from tests.cli.conftest import byte_tokenizer, save_model
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
def test_the_speed_of_random_routers_is_drawn(tmp_path):
    figures.speed(model="tiny-random", preset="quick", folder=tmp_path)
    record = json.loads((tmp_path / "eval-sparsity-speed-tiny-random.jsonl").read_text())
    rows = record["metrics"]["rows"]
    assert len(rows) == 4 and all(row["same_tokens_as_masked"] for row in rows)
