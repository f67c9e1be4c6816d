"""The comparison of trainings from end to end on a toy; what the numbers are is not looked at."""

import json

import pytest

from jaxinfer.texts import write_source
from tests.cli.conftest import byte_tokenizer, save_model
from tools.reproduce import reproduce_lte


@pytest.mark.slow
def test_every_method_has_a_row_and_a_second_run_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    words = "Some words of a text that is read, and then some more of them. " * 20
    documents = [(f"c{x}{i:02}", f"{i} {words}") for x in "abcdefgh" for i in range(1, 9)]
    write_source(tmp_path / "texts", "brown", documents)
    model = str(save_model(tmp_path / "toy", byte_tokenizer(None)))
    options = {
        "model": model, "run_dir": tmp_path / "run", "seeds": 2, "targets": "0.5",
        "block_size": 8, "windows": 8, "context": 32, "held_out": 4, "steps": 2, "batch": 2,
    }  # fmt: skip

    def record():
        reproduce_lte.main(**options, folder=tmp_path / "results")
        written = (tmp_path / "results" / "eval-lte-seeds-toy.jsonl").read_text()
        return json.loads(written.splitlines()[-1])["metrics"]["rows"]

    rows = record()
    assert [row["method"] for row in rows] == ["dense", *reproduce_lte.METHODS]
    assert all(row["seeds"] == 2 and row["lowest"] <= row["highest"] for row in rows)
    by_name = {row["method"]: row for row in rows}
    assert by_name["dense"]["products"] == 1 and by_name["dense"]["relative"] == 1
    assert by_name["LTE"]["neurons"] <= by_name["MoEfication"]["neurons"]
    before = {path: path.read_text() for path in (tmp_path / "run").rglob("speed.jsonl")}
    assert len(before) == 2 * (1 + 2) * 2  # seeds, trainings, stages
    assert record() == rows
    assert before == {path: path.read_text() for path in before}
