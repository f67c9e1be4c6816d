"""The figures of Laughing Hyena write their three files, at their smallest sizes."""

import json

import numpy as np
import pytest

from tools.reproduce.reproduce_laughing_hyena import (
    FIGURES,
    cut,
    figures,
    log_probs,
    lost,
    random_model,
)


@pytest.mark.parametrize(
    "name",
    [name if name == "spectra" else pytest.param(name, marks=pytest.mark.slow) for name in FIGURES],
)
def test_a_figure_writes_record_table_and_plot(name, tmp_path):
    figures(model="random", quick=True, only=name, folder=tmp_path)
    stem = f"laughing-hyena-{name}-random"
    (line,) = (tmp_path / f"eval-{stem}.jsonl").read_text().splitlines()
    rows = json.loads(line)["metrics"]["rows"]
    assert len(rows) >= 2
    table = (tmp_path / f"{stem}.md").read_text()
    assert table.count("\n| ") >= len(rows) and f"{stem}.png" in table
    assert (tmp_path / f"{stem}.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_cut_behind_the_last_lag_is_the_model_itself_and_others_lose():
    lm = random_model(quick=True)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 64))
    exact = log_probs(lm, tokens)
    assert np.allclose(np.exp(exact).sum(axis=-1), 1, atol=1e-4)
    whole, none = (lost(exact, log_probs(cut(lm, lag), tokens), tokens) for lag in (63, 0))
    assert abs(whole["KL"]) < 1e-6 and whole["same likeliest token"] == 1
    assert none["KL"] > 10 * abs(whole["KL"])
