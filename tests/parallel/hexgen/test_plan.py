"""Clusters and plans as files: what is written is read again, and anything else is refused."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.parallel.hexgen.costs import Assumptions, Costs
from jaxinfer.parallel.hexgen.inventory import Cluster, Link
from jaxinfer.parallel.hexgen.layouts import Stage
from jaxinfer.parallel.hexgen.plan import Plan
from jaxinfer.parallel.hexgen.sizes import ModelSizes
from jaxinfer.parallel.hexgen.workload import Workload
from tests.parallel.hexgen.clusters import GPUS, cluster

MACHINES = (("A5000", 4, "X"), ("A6000", 2, "Y"))
COSTS = Costs(cluster(*MACHINES), ModelSizes.published(4096, 24), Assumptions())
LOAD = Workload(requests_per_s=1.0, deadline_s=5.0, lengths=((64, 32, 1.0), (8, 8, 2.0)))
PLAN = Plan.of(
    COSTS, LOAD, [(Stage(0, 2, 14), Stage(1, 1, 10)), (Stage(0, 1, 24),)], attainment=0.5
)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert PLAN.idle == ((3,), (1,))
    assert PLAN.stages[0] == (Stage(0, 2, 14), Stage(1, 1, 10))
    assert PLAN.capacity == pytest.approx(sum(1 / x["bottleneck_s"] for x in PLAN.predicted()))


def test_a_plan_explains_itself():
    text = PLAN.explain()
    assert "m0: 2 x A5000, layers 0-13" in text and "m1: 1 x A6000, layers 14-23" in text
    assert "idle on m1: 1 x A6000" in text and "50.0% of requests within 5 s" in text


def test_a_cluster_is_read_as_it_was_written(tmp_path):
    named = Cluster(
        machines=COSTS.cluster.machines,
        links=(("m0", "m1", Link(latency_s=1.0, bytes_per_s=2.0)),),
    )
    (tmp_path / "c.json").write_text(json.dumps(named.to_dict()))
    assert Cluster.load(tmp_path / "c.json") == named
    assert named.link(0, 1) == named.link(1, 0) == Link(latency_s=1.0, bytes_per_s=2.0)
    (tmp_path / "c.toml").write_text("""
        version = 1
        [gpus.small]
        memory_bytes = 16e9
        bytes_per_s = 448e9
        flops_per_s = 77e12
        [[machines]]
        name = "box"
        gpu = "small"
        count = 2
        region = "here"
        link = { latency_s = 5e-6, bytes_per_s = 12e9 }
    """)
    found = Cluster.load(tmp_path / "c.toml")
    assert found.counts == (2,) and found.machines[0].gpu.flops_per_s == 77e12


def test_links_of_machines_count_before_those_of_regions():
    slow, fast = Link(latency_s=1.0, bytes_per_s=1.0), Link(latency_s=0.0, bytes_per_s=1e9)
    machines = cluster(("A4000", 1, "X"), ("A4000", 1, "Y"), ("A4000", 1, "Y")).machines
    found = Cluster(
        machines=machines, same_region=fast, links=(("X", "Y", slow), ("m0", "m2", fast))
    )
    assert [found.link(0, 1), found.link(0, 2), found.link(1, 2)] == [slow, fast, fast]


def test_a_lost_machine_keeps_its_place():
    less = COSTS.cluster.without("m0", 3)
    assert less.counts == (1, 2) and COSTS.cluster.without("m1").counts == (4, 0)
    with pytest.raises(ValueError, match="no machine is called 'm7'"):
        less.without("m7")
    with pytest.raises(ValueError, match="count must be a whole number from 0 to 1"):
        less.without("m0", 2)


def changed(data, path, value):
    data = copy.deepcopy(data)
    *way, last = path
    place = data
    for key in way:
        place = place[key]
    place[last] = value
    return data


STAGE = ("replicas", 0, "stages", 0)
BAD_PLANS = {
    "another version": (("version",), 2, "version of a plan"),
    "no cluster": (("cluster",), None, "cluster must be an object"),
    "an edited model": (("model", "layers"), 24.5, "layers must be a whole number"),
    "an edited deadline": (("workload", "deadline_s"), 6.0, "inputs_hash"),
    "nan": (("workload", "deadline_s"), float("nan"), "deadline_s"),
    "overlapping devices": ((*STAGE, "devices"), [0, 2], "device 2 of 'm0' is used twice"),
    "one device twice": ((*STAGE, "devices"), [1, 1], "used twice"),
    "no such device": ((*STAGE, "devices"), [0, 9], "from 0 to 3"),
    "no devices": ((*STAGE, "devices"), [], "devices must be"),
    "a forbidden degree": ((*STAGE, "devices"), [0, 1, 3], "the plan's degrees"),
    "a gap of layers": ((*STAGE, "layers"), [0, 13], "expected from 13"),
    "an overlap of layers": ((*STAGE, "layers"), [0, 15], "expected from 15"),
    "an empty stage": ((*STAGE, "layers"), [0, 0], "one layer or more"),
    "layers beyond the model": ((*STAGE, "layers"), [0, 99], "at most 24"),
    "an unknown machine": ((*STAGE, "machine"), "m9", "no machine is called 'm9'"),
    "too many layers for memory": (
        ("assumptions", "reserve_bytes"), 23e9, "GiB on each device, of which",
    ),
    "no stages": (("replicas", 0, "stages"), [], "the number of stages"),
    "no replicas": (("replicas",), [], "number of replicas"),
    "replicas of texts": (("replicas",), ["x"], "a replica must be an object"),
    "attainment above one": (("attainment",), 1.5, "attainment"),
    "an unknown gpu": (("cluster", "machines", 0, "gpu"), "abacus", "gpu of a machine"),
    "a zero link": (
        ("cluster", "same_region"), {"latency_s": 0.1, "bytes_per_s": 0}, "bytes_per_s of a link",
    ),
    "a negative latency": (
        ("cluster", "same_region"), {"latency_s": -1, "bytes_per_s": 1}, "latency_s of a link",
    ),
    "machines of one name": (("cluster", "machines", 1, "name"), "m0", "two machines"),
    "a link to nowhere": (
        ("cluster", "links"), [{"between": ["X", "Z"], "latency_s": 0, "bytes_per_s": 1}], "'Z'",
    ),
    "no link": (("cluster", "other_regions"), None, "no link between"),
    "a huge count": (("cluster", "machines", 0, "count"), 10**9, "from 0 to 1024"),
    "an unknown field": (("cluster", "extra"), 1, "unknown field 'extra'"),
    "an unknown field of a gpu": (("cluster", "gpus", "A5000", "x"), 1, "unknown config fields"),
    "a text for a number": (("cluster", "gpus", "A5000", "memory_bytes"), "24", "memory_bytes"),
    "a boolean for a number": (("cluster", "machines", 0, "count"), True, "count of machine"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_bad_plan_is_refused_in_one_line_that_names_the_file(name, tmp_path):
    where, value, expected = BAD_PLANS[name]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(changed(PLAN.to_dict(), where, value)))
    with pytest.raises(ValueError) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert expected in message and "plan.json" in message and "\n" not in message


def places(data, way=()):
    yield way
    if not isinstance(data, dict | list):
        return
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield from places(value, (*way, key))


WRITTEN = PLAN.to_dict()
PLACES = [way for way in places(WRITTEN) if way and "predicted" not in way]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PLACES), VALUES)
def test_any_change_of_a_plan_is_refused_or_a_sound_plan(where, value):
    data = json.loads(json.dumps(changed(WRITTEN, where, value)))
    try:
        found = Plan.from_dict(data)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert Plan.from_dict(found.to_dict()) == found and found.explain()


def test_gpus_of_the_tests_are_what_the_notes_say():
    assert GPUS["A100"].bytes_per_s == 1555e9 and GPUS["A40"].memory_bytes == 48 * 2**30
