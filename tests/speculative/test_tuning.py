"""Tuning measures once, chooses by what it measured, and says so when speculation does not pay."""

import itertools
import json

import pytest

import jaxinfer as ji
from jaxinfer.decode.sampling import Sampler
from jaxinfer.speculative import step_times, tuning
from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.step_times import measure_step, measure_times
from jaxinfer.speculative.tuning import Tuned, roofline, tried, tune
from tests.factories import lm_of, scripted_lm

GOOD = Acceptance(p=(0.8, 0.1, 0.05))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    return tmp_path


def tuned(verify: dict[int, float], draft_ms: float, acceptance=GOOD) -> Tuned:
    return Tuned(acceptance=acceptance, verify_ms=verify, draft_ms=draft_ms)


def test_flat_times_ask_for_a_tree_and_steep_ones_for_none():
    assert tuned({1: 1.0, 4: 1.1, 8: 1.2}, 0.05).choice().topology.nodes == 8
    assert tuned({1: 1.0, 4: 3.9, 8: 7.8}, 0.2).choice().topology.nodes == 1


def test_a_tree_that_promises_little_is_left_alone_but_listed():
    promising, doubtful = (tuned({1: ms, 2: 1.0}, 0.5).choice() for ms in (1.0, 0.95))
    assert promising.topology.nodes == 2 and promising.speedup == pytest.approx(1.2)
    assert doubtful.topology.nodes == 1 and doubtful.speedup == 1.0
    assert max(one.speedup for one in doubtful.candidates) == pytest.approx(1.14)


def test_depths_that_were_not_measured_are_not_used():
    by_depth = Acceptance(p=((0.9,), (0.8,)))
    assert tuned({1: 1.0, 8: 1.0}, 0.0, by_depth).choice().topology.levels == 3


def test_a_second_call_measures_nothing(cache, monkeypatch):
    lm = scripted_lm([b"a", b"b"])
    options = {"sizes": (2, 3), "new_tokens": 12, "prompts": [[0], [1]]}
    first = tune(lm, None, Sampler(), **options)
    assert set(first.verify_ms) == {1, 2, 3} and all(ms > 0 for ms in first.verify_ms.values())
    monkeypatch.setattr(tuning, "measure_times", None)
    assert tune(lm, None, Sampler(), **options) == first
    (path,) = (cache / "trees").iterdir()
    path.write_text(json.dumps({"acceptance": 3}))
    with pytest.raises(TypeError):  # measures again, which the test has made impossible
        tune(lm, None, Sampler(), **options)


def test_auto_uses_the_measured_tree_or_none(monkeypatch):
    lm = lm_of()
    spec, new = ji.speculate(lm, lm), {"max_new_tokens": 10, "ignore_eos": True}
    expected = lm.generate([[1, 2]], **new)[0].tokens
    monkeypatch.setattr(tuning, "tune", lambda *a, **k: tuned({1: 1.0, 3: 1.0}, 0.0))
    out = spec.generate([[1, 2]], **new)[0]
    assert out.tokens == expected and out.stats.tokens_per_step > 2
    monkeypatch.setattr(tuning, "tune", lambda *a, **k: tuned({1: 1.0, 3: 9.0}, 1.0))
    out = spec.generate([[1, 2]], **new)[0]
    assert out.tokens == expected and out.stats.step_tokens == ()


def test_a_chosen_tree_that_costs_more_than_forecast_is_given_up_or_made_shallower():
    found = tuned({1: 1.0, 4: 1.1, 8: 1.2}, 0.05)
    choice = found.choice()
    assert tried(found, lambda tree: choice.step_cost) == found  # as forecast
    assert tried(found, lambda tree: 9.0).choice().topology.nodes == 1
    slower = tried(found, lambda tree: 1.2 + 0.25 * (tree.levels - 1))
    assert slower.draft_ms == pytest.approx(0.25)
    assert 1 < slower.choice().topology.levels < choice.topology.levels


def test_a_step_is_timed_with_the_tree_that_was_chosen(monkeypatch):
    monkeypatch.setattr(step_times, "ROUNDS", 1)
    lm = lm_of()
    ratio = measure_step(lm, ji.early_exit(lm, 1), Sampler(), ji.Topology.chain(3))
    assert 0 < ratio < 1000


def test_a_machine_whose_clock_changes_is_timed_in_its_own_plain_steps(monkeypatch):
    def steps(target, plan, *rest):
        cost, clock = 2.0, itertools.count()
        if plan is not None:
            cost *= 1 + 0.1 * plan.topology.nodes + 0.4 * (plan.draft is not None)
        return lambda: cost * (1 + next(clock) % 3)

    monkeypatch.setattr(step_times, "_steps", steps)
    lm = lm_of()
    times, passes = measure_times(lm, ji.early_exit(lm, 1), Sampler(), sizes=(2, 8))
    assert times[1] in (2.0, 4.0, 6.0)
    assert times[2] / times[1] == pytest.approx(1.2) and times[8] / times[1] == pytest.approx(1.8)
    assert passes / times[1] == pytest.approx(0.4 / step_times.PASSES)


def test_a_roofline_is_flat_until_operations_count():
    lm = lm_of()
    found = roofline(tuned({1: 1.0, 2: 2.0}, 1.0), lm, ji.early_exit(lm, 1), "h200")
    assert found.verify_ms[1] == found.verify_ms[128] < found.verify_ms[256]
    assert 0 < found.draft_ms < found.verify_ms[1]
    away = roofline(tuned({1: 1.0, 2: 2.0}, 1.0), lm, ji.early_exit(lm, 1), "l40-offload")
    assert away.verify_ms[1] == away.verify_ms[512] and away.draft_ms < away.verify_ms[1] / 20
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        roofline(found, lm, None, "abacus")


DAMAGED = {
    "no plain time": lambda d: d["verify_ms"].pop("1"),
    "a time of nothing": lambda d: d["verify_ms"].update({"1": 0}),
    "a huge time": lambda d: d["verify_ms"].update({"2": 10**400}),
    "no number of nodes": lambda d: d["verify_ms"].update({"²": 1.0}),
    "infinite passes": lambda d: d.update(draft_ms=float("inf")),
    "passes of no number": lambda d: d.update(draft_ms=None),
    "times in a list": lambda d: d.update(verify_ms=[1.0]),
    "no acceptance": lambda d: d.pop("acceptance"),
    "another field": lambda d: d.update(more=1),
    "acceptance of no rows": lambda d: d["acceptance"].update(p=[]),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_of_times_is_measured_anew(tmp_path, damage):
    found = tuning.Tuned(
        acceptance=Acceptance(p=(0.5, 0.2), pair=("a", "b")),
        verify_ms={1: 1.0, 2: 1.1},
        draft_ms=0.1,
    )
    path, data = tmp_path / "times.json", json.loads(json.dumps(found.to_dict()))
    path.write_text(json.dumps(data))
    assert tuning._read(path) == found
    damage(data)
    path.write_text(json.dumps(data))
    assert tuning._read(path) is None
    path.write_text("[" * 100_000)
    assert tuning._read(path) is None
