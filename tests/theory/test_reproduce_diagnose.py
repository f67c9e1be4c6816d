"""The comparison of policies per layer judges as scoring does, and its choices fit their bytes."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

import jaxinfer as ji
from jaxinfer.eval.memory import layer_bytes
from tests.factories import lm_of, random_tokens
from tools.reproduce.reproduce_diagnose import (
    Judge,
    funnel,
    keys_first,
    main,
    random_choice,
    rank_correlation,
    total_bytes,
)


def test_documents_are_judged_as_scoring_has_them():
    lm, tokens = lm_of("llama"), random_tokens(2, 24)
    policies = [ji.h2o(3, 4), ji.streaming(1, 5)]
    found = Judge.of(lm, tokens).losses(policies)
    expected = [one.nll for one in lm.score(tokens.tolist(), policy=ji.per_layer(policies))]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_baselines_fit_into_their_bytes():
    lm, length = ji.load("tiny-llama"), 256
    budget = sum(layer_bytes(lm, ji.h2o(25, 25), length))
    made = funnel(lm, budget, length)
    heavy = [getattr(one.tiers[1], "size", 0) for one in made]
    assert heavy == sorted(heavy, reverse=True) and heavy[0] > 2 * heavy[-1]
    assert 0.9 * budget < total_bytes(lm, made, length) <= budget
    smallest = ji.h2o(12, 12)
    wide = sum(layer_bytes(lm, "kivi4", length))
    made = keys_first(lm, wide // 2, length, smallest)
    assert total_bytes(lm, made, length) <= wide // 2
    assert made[0].name.startswith("kivi") and made[-1] == smallest


def test_random_choices_fit_and_differ():
    rng = np.random.default_rng(0)
    sizes = np.tile([10, 20, 40], (6, 1))
    drawn = [random_choice(sizes, 100, rng) for _ in range(20)]
    assert all(sizes[np.arange(6), one].sum() <= 100 for one in drawn)
    assert len({tuple(one) for one in drawn}) > 10


def test_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 30)).astype(float)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y)[0])
    assert rank_correlation(x, np.ones(30)) == 0


@pytest.mark.slow
def test_the_command_writes_two_tables(tmp_path):
    main(tmp_path / "run", quick=True, folder=tmp_path / "out", model="tiny-llama")
    (line,) = (tmp_path / "out/eval-diagnose-tiny-llama.jsonl").read_text().splitlines()
    rows = json.loads(line)["metrics"]["rows"]
    assert {"uniform", "output", "measured", "funnel"} <= {row["chosen by"] for row in rows}
    assert all(row["bytes"] <= row["budget"] for row in rows)
    assert (tmp_path / "out/diagnose-tiny-llama-scores.png").stat().st_size > 5000
