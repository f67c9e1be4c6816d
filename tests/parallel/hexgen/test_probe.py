"""What is measured of this machine is a cluster that plans can be made with."""

import json

import numpy as np
import pytest

from jaxinfer.parallel.hexgen import Cluster, ModelSizes, Workload, probe, schedule


@pytest.fixture(scope="module")
def found():
    return probe(seconds=0.02, name="this one")


def test_measured_rates_are_those_of_some_machine(found):
    """Wide limits: a product is no slower than numpy's would be on one bad core."""
    (machine,) = found.machines
    assert machine.name == "this one" and machine.count >= 1
    assert 1e8 < machine.gpu.flops_per_s < 1e16
    assert 1e7 < machine.gpu.bytes_per_s < 1e14
    assert 1e-7 < machine.link.latency_s < 1.0
    assert 1e5 < machine.link.bytes_per_s < 1e12
    assert machine.gpu.memory_bytes > 2**20


def test_the_file_is_read_by_the_planner(found, tmp_path):
    (tmp_path / "here.json").write_text(json.dumps(found.to_dict()))
    cluster = Cluster.load(tmp_path / "here.json")
    assert cluster == found
    load = Workload(requests_per_s=0.1, deadline_s=1000.0, lengths=((8, 8, 1.0),))
    sizes = ModelSizes.published(hidden=64, layers=4)
    assert schedule(cluster, sizes, load, method="start", requests=10).attainment == 1.0


def test_seconds_out_of_range_are_refused():
    for seconds in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="seconds must be a number"):
            probe(seconds=seconds)
