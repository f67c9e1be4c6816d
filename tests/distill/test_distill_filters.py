"""`ji.distill_filters`: laughing_hyena.md 5.1, 5.2 and 5.6 (a, b), methods, report, refusals."""

import json
import re
from dataclasses import replace
from statistics import median

import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.distill.filters import refine as refinement
from jaxinfer.distill.filters.distill import NAMES
from jaxinfer.distill.filters.methods import hankel_start, relative_errors
from jaxinfer.distill.filters.order import choose_taps, grown_modes, spectral_modes
from jaxinfer.distill.filters.refine import Recipe, refine
from jaxinfer.distill.filters.report import DistillReport
from jaxinfer.nn.modal import impulse_response
from tests.distill.filter_banks import hyena_filters, sums_of_modes

# Filters, lags, modes and steps are the same where they can be: one compiled program.
SHORT = {"order": 4, "steps": 200}
LAGS = 512


def test_exact_sums_are_recovered_by_the_half_hankel():
    # laughing_hyena.md 5.1: below 1e-5 on every filter, for float32 leaves; radii as there, and all
    # slow, which balanced truncation does not survive as their tails are cut
    h = np.concatenate([sums_of_modes(4, 4, LAGS)[2], sums_of_modes(4, 4, LAGS, least=0.985)[2]])
    filters, report = ji.distill_filters(h, **SHORT)
    assert report.worst < 1e-5
    assert {one.method for one in report.filters[4:]} <= {"half Hankel", "refined"}
    assert all(one.order == one.modes * 2 == 8 for one in report.filters)
    assert np.abs(impulse_response(filters, LAGS) - h).max() < 1e-4 * np.abs(h).max()
    _, balanced = ji.distill_filters(h[4:], order=4, method="balanced")
    assert median(one.error for one in balanced.filters) > 1e-4


@pytest.fixture(scope="module")
def bank():
    return hyena_filters(LAGS)


def test_descent_improves_balanced_truncation_of_random_hyena_filters(bank):
    # laughing_hyena.md 5.2 with few steps: at most 1.02 times balanced truncation's error
    filters, report = ji.distill_filters(bank, **SHORT, taps=0)
    _, balanced = ji.distill_filters(bank, order=4, method="balanced")
    errors = np.array([one.error for one in report.filters])
    before = np.array([one.error for one in balanced.filters])
    assert (errors <= 1.02 * before).all() and np.median(errors) < 0.36
    assert np.median(errors / before) < 0.99
    assert all(one.bound <= one.error and one.hankel_bound <= one.hankel for one in report.filters)
    assert all(one.error <= one.hankel <= 1.001 * one.h_infinity for one in report.filters)
    assert all(one.h_infinity <= one.l1 and one.radius < 1 for one in report.filters)
    assert np.allclose(filters.h0, bank[:, 0], rtol=1e-6)


@pytest.mark.slow
def test_the_table_of_random_hyena_filters(bank):
    # laughing_hyena.md 5.2: medians below 0.23 (n = 16) and 0.075 (n = 32). The paper's recipe at
    # K = 8 depends on seeds: 0.22 to 0.36 there, 0.42 to 0.47 with three of these filters
    for order, most in ((8, 0.23), (16, 0.075)):
        _, report = ji.distill_filters(bank, order=order)
        errors = np.array([one.error for one in report.filters])
        _, balanced = ji.distill_filters(bank, order=order, method="balanced")
        assert (errors <= 1.02 * np.array([one.error for one in balanced.filters])).all()
        assert np.median(errors) < most
    _, paper = ji.distill_filters(bank, order=8, method="paper")
    assert 0.22 < np.median([one.error for one in paper.filters]) < 0.52


@pytest.mark.slow
def test_the_papers_recipe_on_exact_sums():
    # laughing_hyena.md 5.1: K = 8 reaches a median below 1e-3, not 1e-5 on every filter
    _, _, h = sums_of_modes(8, 4, 512)
    _, report = ji.distill_filters(h, order=8, method="paper")
    errors = np.array([one.error for one in report.filters])
    assert np.median(errors) < 1e-3 and errors.max() > 1e-5


def test_a_pure_delay_has_no_modal_form():
    # laughing_hyena.md 5.6 (a)
    for order in (4, 7):
        _, report = ji.distill_filters(np.eye(1, 128, 16), order=order, method="balanced")
        assert report.filters[0].error > 0.5 and report.fallbacks == (0,)
        assert report.filters[0].hankel_bound == pytest.approx(1)
        assert "no modal form" in report.filters[0].note


def test_taps_hold_what_has_no_modal_form():
    # laughing_hyena.md 5.6 (a) and (b): a delay, a slow mode behind short taps, plain sums
    lags = LAGS + 16
    h = np.concatenate([np.eye(1, lags, 16), slow_behind_taps(lags), sums_of_modes(6, 4, lags)[2]])
    filters, report = ji.distill_filters(h, **SHORT, taps=16)
    assert report.taps == filters.delay == 16 and report.states == 24
    assert report.worst < 1e-5 and not report.fallbacks
    assert [one.method == "copied" for one in report.filters] == [True] + 7 * [False]
    assert report.filters[0].note == "ends at lag 16: no modal form, the taps hold it"
    assert [one.order for one in report.filters] == [0, 1] + 6 * [8]
    assert report.filters[1].radius == pytest.approx(np.exp(-5e-4), abs=1e-6)
    assert np.abs(impulse_response(filters, lags) - h).max() < 1e-4 * np.abs(h).max()


def slow_behind_taps(lags: int) -> np.ndarray:
    h = np.exp(-5e-4 * np.arange(lags))[None]
    h[:, 1:5] += [2, -3, 1, 2]
    return h


def test_taps_are_the_fewest_and_only_where_modes_of_as_many_bytes_fail():
    assert choose_taps(slow_behind_taps(200)[:, 1:], 1, 0.01) == 4
    assert choose_taps(np.eye(1, 199, 15), 4, 1e-4) == 16
    assert choose_taps(np.eye(1, 199, 59), 4, 0.01) == 0  # a delay beyond all of them
    _, _, sums = sums_of_modes(3, 6, 200)
    assert choose_taps(sums[:, 1:], 5, 0.01) == 0  # one mode more does it


def test_the_automatic_order_reaches_the_tolerance():
    h = hyena_filters(160)[4:]
    sizes = []
    for tolerance in (0.3, 0.1):
        _, report = ji.distill_filters(h, order="auto", tolerance=tolerance, method="balanced")
        assert report.worst <= 1.1 * tolerance
        sizes.append(report.modes)
    assert 2 < sizes[0] < sizes[1] < 32


def test_a_tighter_tolerance_never_takes_fewer_modes():
    """Also where filters need more than there may be: three of noise under a window, which few
    modes more bring to one tolerance and none to the next."""
    random = np.random.default_rng(1)
    faded = random.normal(size=(2, 60)) * 0.9 ** np.arange(60)
    g = np.concatenate([faded, sums_of_modes(1, 2, 61)[2][:, 1:]])
    found = []
    for tolerance in (0.5, 0.3, 0.1, 0.03, 0.01, 0.003, 1e-3, 1e-4):
        found.append(grown_modes(g, spectral_modes(g, tolerance), tolerance))
    assert found == sorted(found) and found[0] < 8 and 12 <= found[-1] <= 24


def test_a_hopeless_filter_does_not_raise_the_order_of_others():
    _, _, h = sums_of_modes(3, 2, 240)
    g = np.concatenate([h[:, 1:], np.random.default_rng(0).normal(size=(1, 239))])
    base = spectral_modes(g, 0.01)
    assert base <= 3 and grown_modes(g, base, 0.01) == base


@pytest.mark.parametrize("method", NAMES[1:])
def test_every_method_fits_what_it_can(method):
    h = hyena_filters(200)[5:]
    filters, report = ji.distill_filters(h, order=4, method=method, steps=300)
    errors = [one.error for one in report.filters]
    if method not in ("paper", "modal"):  # too few steps; residues of a larger model
        assert max(errors) < 1 and min(errors) < 0.75
    assert report.states == 8
    assert all(one.bound <= one.error for one in report.filters)
    filters.check()
    assert (filters.delay, filters.modes) == ((8, 0) if method == "fir" else (0, 4))


def test_filters_without_anything_behind_lag_0():
    h = np.zeros((3, 64))
    h[1] = 0.9 ** np.arange(64)
    h[2, 0] = 5
    filters, report = ji.distill_filters(h, order=2, method="balanced")
    assert [one.error for one in report.filters][::2] == [0, 0] and report.worst < 1e-3
    assert [one.order for one in report.filters][::2] == [0, 0]
    assert report.filters[0].note == report.filters[2].note == "zero behind lag 0"
    assert np.asarray(filters.h0).tolist() == [0, 1, 5]


def test_groups_are_equal_and_put_together(monkeypatch):
    g = np.random.default_rng(0).normal(size=(5, 30))
    start = hankel_start(g, 2).filters
    groups, told = [], []

    def descend(part, goal, recipe, done):
        groups.append(goal.shape)
        done(recipe.steps)
        return replace(part, nu=jnp.asarray(goal[:, :2]))

    monkeypatch.setattr(refinement, "_descend", descend)
    monkeypatch.setattr(refinement, "MEMORY", 2 * refinement.BYTES * 30)
    report = lambda what, done, total, note="": told.append((done, total))  # noqa: E731
    found = refine(start, 1e6 * g, Recipe(steps=7), report)
    assert groups == 3 * [(2, 30)] and told == [(7, 21), (14, 21), (21, 21)]
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    assert np.allclose(found.nu, unit[:, :2], rtol=1e-6) and np.allclose(
        found.a, start.a, rtol=1e-6
    )


def test_descent_is_stable_and_never_worse_than_its_start():
    # laughing_hyena.md 5.4: radii stay below 1 and nothing is NaN, however large the steps
    g = hyena_filters(64, channels=2)[:, 1:]
    start = hankel_start(g, 2).filters
    wild = refine(start, g, Recipe(steps=60, peak=3.0))
    wild.check()
    assert (relative_errors(wild, g) <= 1.001 * relative_errors(start, g)).all()


def test_the_report_is_a_table_and_json():
    _, report = ji.distill_filters(hyena_filters(64)[:2], order=2, method="balanced")
    read = json.loads(json.dumps(report.to_dict()))
    assert read["worst"] == report.worst and read["fallbacks"] == [0, 1] and read["modes"] == 2
    assert read["filters"][0]["bound"] == report.filters[0].bound
    assert DistillReport.from_dict(read) == report
    with pytest.raises(ValueError, match="no report"):
        DistillReport.from_dict({"filters": 3})
    rows = report.table().splitlines()
    assert len(rows) == 4 and {row.count("|") for row in rows} == {11}
    assert "fall back" in rows[2] and "balanced" in rows[2]
    assert "advised for 2" in str(report).splitlines()[0]


NAN = np.full((2, 16), 0.5)
NAN[1, 3] = np.nan
GOOD = np.full((2, 16), 0.5)


@pytest.mark.parametrize(
    ("h", "options", "line"),
    [
        (NAN, {}, "filter 1 is not finite at lag 3"),
        (GOOD[0], {}, r"got shape \[16\]"),
        (GOOD[:, :3], {}, r"got shape \[2, 3\]"),
        (GOOD[:0], {}, r"got shape \[0, 16\]"),
        (GOOD * 1j, {}, "real numbers"),
        (GOOD > 0, {}, "real numbers"),
        ("filters", {}, r"\[filters, lags\]"),
        (GOOD, {"order": 8}, "16 states, but the filters have 15 samples"),
        (GOOD, {"order": 0}, "order must be"),
        (GOOD, {"order": "most"}, "order must be .*'auto', got 'most'"),
        (GOOD, {"order": True}, "order must be"),
        (GOOD, {"order": 5, "method": "rational"}, "at most 4"),
        (GOOD, {"order": 4, "method": "adam"}, "method must be one of"),
        (GOOD, {"order": 4, "tolerance": 0}, "tolerance"),
        (GOOD, {"order": 4, "tolerance": float("nan")}, "tolerance"),
        (GOOD, {"order": 4, "taps": 9}, "taps must be a whole number from 0 to 7"),
        (GOOD, {"order": 4, "steps": 0}, "steps"),
    ],
)
def test_bad_input_is_refused_in_a_line(h, options, line):
    with pytest.raises(ValueError, match=line) as caught:
        ji.distill_filters(h, **options)
    assert not re.search("\n", str(caught.value))


def test_bfloat16_filters_are_read_as_they_are():
    h = jnp.asarray(0.75 ** np.arange(16)[None], jnp.bfloat16)
    _, report = ji.distill_filters(h, order=2, method="balanced")
    assert report.worst < 2e-2
