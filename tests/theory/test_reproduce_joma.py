"""The figures of JoMA write their three files, at their smallest sizes."""

import json

import numpy as np
import pytest
import typer

from jaxinfer.train.run_folder import write_arrays
from tools.reproduce.reproduce_joma import FIGURES, SHOWN, main


def written(folder, name):
    (line,) = (folder / f"eval-joma-{name}.jsonl").read_text().splitlines()
    rows = json.loads(line)["metrics"]["rows"]
    table = (folder / f"joma-{name}.md").read_text()
    assert table.count("\n| ") >= len(rows) and f"joma-{name}.png" in table
    assert (folder / f"joma-{name}.png").stat().st_size > 5000
    return rows


def test_the_flows_have_the_values_that_are_expected(tmp_path):
    main(quick=True, only="flows", folder=tmp_path)
    for row in written(tmp_path, "flows"):
        assert row["found"] == pytest.approx(row["expected"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"flows"}))
def test_a_figure_writes_record_table_and_plot(name, tmp_path):
    main(quick=True, only=name, folder=tmp_path)
    assert written(tmp_path, name)


def test_measured_trainings_are_shown_layer_by_layer(tmp_path):
    for step, entropy in ((0, 0.9), (10, 0.3), (100, 0.6)):
        arrays = {name: np.full((2, 3), entropy, np.float32) for name in SHOWN[:2]}
        arrays |= {name: np.full(2, entropy, np.float32) for name in SHOWN[2:]}
        write_arrays(tmp_path / "run" / "measures" / f"{step}.npz", arrays)
    main(only="checkpoints", measured=[f"relu={tmp_path / 'run'}"], folder=tmp_path)
    rows = written(tmp_path, "checkpoints")
    assert len(rows) == 2 * len(SHOWN)
    assert rows[0]["at share"] == 0.1 and rows[0]["rebound"] == pytest.approx(0.5)
    with pytest.raises(typer.BadParameter, match="expects NAME=RUN_DIR"):
        main(only="checkpoints", measured=["relu=nowhere"], folder=tmp_path)
    with pytest.raises(typer.BadParameter, match="need --measured"):
        main(only="checkpoints", folder=tmp_path)
    with pytest.raises(typer.BadParameter, match="only knows"):
        main(only="nothing", folder=tmp_path)
