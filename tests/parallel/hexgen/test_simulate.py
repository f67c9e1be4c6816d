"""The simulator against closed forms and against SimPy (hexgen.md 5.6 and 2.6)."""

import numpy as np
import pytest

from jaxinfer.parallel.hexgen.costs import Assumptions, Costs
from jaxinfer.parallel.hexgen.layouts import Stage
from jaxinfer.parallel.hexgen.plan import Plan
from jaxinfer.parallel.hexgen.queues import Line, collapsed, latencies
from jaxinfer.parallel.hexgen.requests import whole_requests
from jaxinfer.parallel.hexgen.rounds import RoundTimes
from jaxinfer.parallel.hexgen.routing import POLICIES, Router
from jaxinfer.parallel.hexgen.simulate import peak_rate, simulate
from jaxinfer.parallel.hexgen.sizes import ModelSizes
from jaxinfer.parallel.hexgen.workload import Trace, Workload
from tests.parallel.hexgen import event_simulation
from tests.parallel.hexgen.clusters import cluster

NEVER = np.inf
MIXED = Workload(
    requests_per_s=2.0, deadline_s=6.0, lengths=((64, 32, 2.0), (256, 16, 1.0), (32, 1, 0.5))
)


def plan_of(*pipelines, machines=(("A5000", 4, "X"), ("A6000", 2, "Y")), load=MIXED, **assumed):
    sizes = ModelSizes.published(4096, 24)
    costs = Costs(cluster(*machines), sizes, Assumptions(**({"rows": 1} | assumed)))
    return Plan.of(costs, load, [tuple(Stage(*one) for one in stages) for stages in pipelines])


TWO = plan_of([(0, 2, 14), (0, 1, 10)], [(1, 2, 24)])


def random_lines(random: np.random.Generator, kinds: int) -> list[Line]:
    lines = []
    for _ in range(random.integers(1, 4)):
        shape = kinds, int(random.integers(1, 5))
        lines.append(Line(random.uniform(0.1, 1.0, shape), random.uniform(0.0, 0.5, shape)))
    return lines


def trace_of(arrivals) -> Trace:
    ones = np.ones(len(arrivals), int)
    return Trace(arrival_s=arrivals, prompt=ones, output=ones)


def test_whole_requests_equal_simpy_on_200_random_plans():
    """Every begin and end of every stage in the same order, and each finish to the last bits."""
    random = np.random.default_rng(0)
    for trial in range(200):
        kinds = int(random.integers(1, 4))
        lines = random_lines(random, kinds)
        arrivals = random.exponential(0.3, 25).cumsum()
        which = random.integers(kinds, size=25)
        router = Router(POLICIES[trial % len(POLICIES)], trial)
        found = whole_requests(
            trace_of(arrivals), lines, which.tolist(), router, [NEVER] * len(lines)
        )
        visits, finish = event_simulation.whole_requests(arrivals, which, lines, found.replica)
        np.testing.assert_allclose(found.finish_s, finish, rtol=1e-12)
        assert np.argsort(found.finish_s).tolist() == np.argsort(finish).tolist()
        busy = [np.zeros(line.service_s.shape[1]) for line in lines]
        for r, stays in zip(found.replica, visits, strict=True):
            busy[r] += [end - begin for begin, end in stays]
        for ours, theirs in zip(found.busy_s, busy, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_many_candidates_at_once_equal_one_after_the_other():
    random = np.random.default_rng(1)
    for kinds in (1, 3):
        candidates = [random_lines(random, kinds) for _ in range(6)]
        arrivals, which = random.exponential(0.2, 60).cumsum(), random.integers(kinds, size=60)
        together = latencies(arrivals, which, candidates)
        for column, lines in zip(together.T, candidates, strict=True):
            alone = whole_requests(
                trace_of(arrivals),
                lines,
                which.tolist(),
                Router("least_finish"),
                [NEVER] * len(lines),
            )
            np.testing.assert_allclose(column, alone.latency_s, rtol=1e-9)


def test_a_pipeline_of_equal_requests_is_one_stage():
    random = np.random.default_rng(2)
    for _ in range(20):
        lines = random_lines(random, 1)
        arrivals, kinds = random.exponential(0.4, 50).cumsum(), np.zeros(50, int)
        pair = latencies(arrivals, kinds, [lines, [collapsed(line) for line in lines]])
        np.testing.assert_allclose(pair[:, 0], pair[:, 1], rtol=1e-9)


@pytest.mark.slow
def test_the_mean_wait_of_one_stage_is_that_of_an_m_d_1_queue():
    """rho / (2 (1 - rho)) services, by Pollaczek and Khinchine; within 2 %."""
    load = 0.7
    arrivals = np.random.default_rng(3).exponential(1 / load, 100_000).cumsum()
    line = Line(np.ones((1, 1)), np.zeros((1, 1)))
    waits = latencies(arrivals, np.zeros(len(arrivals), int), [[line]])[:, 0] - 1
    assert waits.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.02)


def test_a_request_alone_takes_the_latency_of_its_layout():
    load = Workload(requests_per_s=1.0, deadline_s=9.0, lengths=((64, 32, 1.0),))
    plan = plan_of([(0, 2, 14), (1, 1, 10)], load=load)
    alone = Trace(arrival_s=np.zeros(1), prompt=np.array([64]), output=np.array([32]))
    latency = plan.predicted()[0]["latency_s"]
    for unit in ("requests", "tokens"):
        found = simulate(plan, alone, unit=unit)
        assert found.latency_s == pytest.approx([latency], rel=1e-9)
    steps = found.time_per_token_s[0] * 31
    assert found.time_to_first_token_s[0] + steps == pytest.approx(latency, rel=1e-9)


@pytest.mark.parametrize("stages", [((0, 1, 24),), ((0, 1, 10), (0, 1, 8), (1, 2, 6))])
def test_continuous_batching_equals_simpy(stages):
    plan = plan_of(stages)
    times, trace = RoundTimes(plan.costs, plan.stages[0]), MIXED.trace(150, 4)
    ours = simulate(plan, trace, unit="tokens")
    first, finish = event_simulation.continuous_batching(
        trace.arrival_s.tolist(), trace.prompt.tolist(), trace.output.tolist(), times, 10**6
    )
    order = range(len(trace))
    np.testing.assert_allclose(ours.first_token_s, [first[i] for i in order], rtol=1e-9)
    np.testing.assert_allclose(ours.finish_s, [finish[i] for i in order], rtol=1e-9)


def test_rows_wait_for_memory():
    """Equal requests, so that memory is a number of rows."""
    load = Workload(requests_per_s=20.0, deadline_s=6.0, lengths=((64, 32, 1.0),))
    tight = plan_of([(0, 1, 24)], load=load, reserve_bytes=12.2 * 2**30)
    times, trace = RoundTimes(tight.costs, tight.stages[0]), load.trace(60, 0)
    rows = int(1 / times.row_share(96)[0])
    assert 2 <= rows < 20
    ours = simulate(tight, trace, unit="tokens")
    first, finish = event_simulation.continuous_batching(
        trace.arrival_s.tolist(), [64] * 60, [32] * 60, times, rows
    )
    np.testing.assert_allclose(ours.finish_s, [finish[i] for i in range(60)], rtol=1e-9)
    larger = Trace(arrival_s=np.zeros(1), prompt=np.array([10**6]), output=np.array([1]))
    with pytest.raises(ValueError, match="1000001 tokens is larger than any replica's memory"):
        simulate(tight, larger, unit="tokens")


@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_lost_machines_lose_no_request_while_another_replica_lives(unit):
    trace = MIXED.trace(120, 5)
    half = float(trace.arrival_s[60])
    found = simulate(TWO, trace, unit=unit, losses=[(half, "m1")])
    assert found.lost == 0 and found.retries.sum() > 0
    again = found.retries > 0
    assert (found.replica[again] == 0).all() and (found.finish_s[again] > half).all()
    assert (found.finish_s[found.replica == 1] <= half).all()
    undisturbed = simulate(TWO, trace, unit=unit)
    assert found.latency_s.mean() > undisturbed.latency_s.mean()
    none_left = simulate(TWO, trace, unit=unit, losses=[(half, "m1"), (half, "m0")])
    assert none_left.lost == (none_left.replica < 0).sum() > 0
    assert np.isinf(none_left.latency_s[none_left.replica < 0]).all()
    assert none_left.attainment(1e9) == pytest.approx(1 - none_left.lost / 120)


def test_routers_differ_as_they_say():
    trace = MIXED.trace(300, 6)
    found = {policy: simulate(TWO, trace, router=policy) for policy in POLICIES}
    assert (found["round_robin"].replica == np.arange(300) % 2).all()
    means = {policy: one.latency_s.mean() for policy, one in found.items()}
    assert means["least_finish"] == min(means.values())
    again = simulate(TWO, trace, router="power_of_two")
    assert (again.replica == found["power_of_two"].replica).all()


def test_figures_follow_from_the_times():
    trace = MIXED.trace(100, 7)
    found = simulate(TWO, trace)
    least = found.least_deadline(0.9)
    assert found.attainment(least) >= 0.9 > found.attainment(least * (1 - 1e-12))
    assert all(0 < use <= 1 for stages in found.utilization for use in stages)
    record = found.to_dict(6.0)
    assert record["attainment"] == found.attainment(6.0) and record["requests"] == 100
    assert "time_to_first_token_s" not in record  # whole requests do not tell it
    assert simulate(TWO, trace, unit="tokens").to_dict()["time_per_token_s"]["mean"] > 0


def test_the_peak_rate_is_the_last_that_meets_the_deadline():
    rates = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    peak = peak_rate(TWO, MIXED, rates=rates, requests=300)
    assert peak in rates[1:-1]
    for rate, passes in ((peak, True), (rates[rates.index(peak) + 1], False)):
        load = Workload(requests_per_s=rate, deadline_s=6.0, lengths=MIXED.lengths)
        assert (simulate(TWO, load.trace(300, 0)).attainment(6.0) >= 0.99) == passes
    assert peak_rate(TWO, MIXED, rates=(1e3,), requests=300) is None
