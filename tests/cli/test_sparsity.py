"""`--sparsity` on the command line gives what `sparsity=` gives."""

import json

import numpy as np
import pytest
from rich.console import Console

import jaxinfer as ji
from jaxinfer.cli.info import _choice, _layers_table
from jaxinfer.io.sparsity import save_sparsity
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.sparsity.artefact import SparsityArtefact
from jaxinfer.sparsity.identity import SparsityConfig
from tests.sparsity.artefacts import layer_of

TEXT = "Some words that are to be scored, and then some more of them.\n" * 4
GENERATE = ("--max-new-tokens", "8", "--json")


@pytest.fixture(scope="module")
def artefact(lm, tmp_path_factory) -> str:
    """Random predictors of the model's first layer; the second stays dense."""
    config = SparsityConfig.of(
        lm.config, fingerprint(lm.params), method="deja_vu", model="tiny", block_size=4
    )
    layer = layer_of(np.random.default_rng(0), lm.config, config, "router")
    folder = tmp_path_factory.mktemp("sparsity") / "predictors"
    save_sparsity(folder, SparsityArtefact(config, (layer, None)))
    return str(folder)


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def objects(result) -> list[dict]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def ways(artefact: str) -> list[tuple[str, ...]]:
    return [
        ("--sparsity", artefact),
        ("--sparsity", "deja-vu", "--sparsity-args", f"source={artefact}"),
    ]


def test_a_prompt_is_continued_by_the_sparse_model(run, model, lm, artefact):
    wanted = lm.generate("hello", max_new_tokens=8, sparsity=artefact)[0]
    for way in ways(artefact):
        (found,) = objects(run("generate", "hello", "--model", model, "--raw", *GENERATE, *way))
        assert found["tokens"] == wanted.tokens and found["stats"]["sparsity"] == "deja_vu"
    assert wanted.tokens != lm.generate("hello", max_new_tokens=8)[0].tokens


def test_a_conversation_is_answered_by_the_sparse_model(run, model, lm, artefact, piped):
    piped("hello\n")
    options = ("--model", model, "--sparsity", artefact, *GENERATE)
    (found,) = objects(run("chat", *options))
    messages = [{"role": "user", "content": "hello"}]
    wanted = lm.chat(messages, max_new_tokens=8, sparsity=artefact)
    assert found["tokens"] == wanted.tokens and found["stats"]["sparsity"] == "deja_vu"


def test_a_text_is_scored_by_the_sparse_model(run, model, lm, artefact, text):
    found = json.loads(run("score", text, "--model", model, "--json", *ways(artefact)[1]).out)
    assert found["sparsity"] == "deja_vu"
    assert found["nll"] == pytest.approx(lm.score(TEXT, sparsity=artefact)[0].nll)


def test_info_says_what_each_layer_reads(run, model, artefact, monkeypatch):
    monkeypatch.setattr("jaxinfer.cpu_kernels.loading.available", lambda: False)
    (found,) = objects(run("info", model, "--capacity", "64", "--json", *ways(artefact)[0]))
    sparse, dense = found["sparsity"]["layers"]
    assert (sparse["blocks"], sparse["block_size"], sparse["density"]) == (12, 4, 0.25)
    assert not sparse["listed"]  # without kernels a CPU reads blocks of 4 neurons as one
    assert dense["density"] == 1 and dense["blocks"] is None
    assert sparse["read_bytes"] == sparse["bytes"] > dense["bytes"] == dense["read_bytes"]
    console = Console(width=100, record=True)
    console.print(_layers_table(found["sparsity"]))
    table = console.export_text()
    assert "sparsity deja_vu" in table and "12 of 4" in table and "all, masked" in table
    here = found["sparsity"]["measured_pays_below"]
    assert sparse["pays_below"] == 0 and 0 <= here <= 1
    assert _choice(found["sparsity"]) == (
        f"layers read a list below a density of 0 in a step; timed now, it pays below {here:.2g}"
    )


def test_every_row_of_an_evaluation_is_of_the_sparse_model(run, model, lm, artefact, text):
    options = ("--text", text, "--tokens", "64", "--alone", "--json")
    (found,) = objects(run("eval", "perplexity", model, *options, *ways(artefact)[0]))
    assert found["sparsity"] == "deja_vu"
    (wanted,) = lm.score([lm.encode(TEXT)[:64]], sparsity=ji.deja_vu(artefact))
    assert found["nll"] == pytest.approx(wanted.nll)
