"""The figures of R_rho write their three files, at their smallest sizes."""

import json

import pytest

from tools.reproduce.reproduce_r_rho import FIGURES, figures


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_writes_record_table_and_plot(name, tmp_path):
    figures(quick=True, only=name, folder=tmp_path)
    (line,) = (tmp_path / f"eval-r-rho-{name}.jsonl").read_text().splitlines()
    rows = json.loads(line)["metrics"]["rows"]
    assert len(rows) >= 4
    table = (tmp_path / f"r-rho-{name}.md").read_text()
    assert table.count("\n| ") >= len(rows) and f"r-rho-{name}.png" in table
    assert (tmp_path / f"r-rho-{name}.png").stat().st_size > 5000
