"""The server in front of a plan: the same application and texts, also after a loss."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

import jaxinfer as ji
from jaxinfer.parallel import hexgen
from jaxinfer.parallel.hexgen import Assumptions, Costs, ModelSizes, Plan, Stage, Workload
from jaxinfer.parallel.hexgen.serving import check_plan
from tests.parallel.hexgen.clusters import cluster
from tests.serve.serving import serving

LOAD = Workload(requests_per_s=1.0, deadline_s=5.0, lengths=((32, 16, 1.0),))
PROMPTS = ["Once upon a time", "The king said", "It was in the year of", "She had never seen"]


@pytest.fixture(scope="module")
def lm():
    return ji.load("tiny-llama")


def plan_for(config, *pipelines) -> Plan:
    costs = Costs(
        cluster(("A5000", 2, "X"), ("A4000", 2, "X")), ModelSizes.of(config), Assumptions()
    )
    return Plan.of(costs, LOAD, pipelines)


def test_clients_get_the_texts_of_the_model_whatever_dies(lm):
    plan = plan_for(lm.config, (Stage(0, 2, 4), Stage(1, 1, 2)))
    expected = [lm.generate(one, max_new_tokens=16)[0].text for one in PROMPTS]
    with hexgen.serve(plan, "tiny-llama", slots=4, context=64) as batcher:
        stages = batcher._serving.ring.processes
        with serving(batcher) as server:

            def ask(prompt: str) -> str:
                done = server.client().completions.create(
                    model="tiny-llama", prompt=prompt, max_tokens=16, temperature=0
                )
                return done.choices[0].text

            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                assert list(pool.map(ask, PROMPTS)) == expected
                os.kill(stages[0].pid, signal.SIGKILL)
                assert list(pool.map(ask, PROMPTS)) == expected
            described = server.get("/v1/models").json()["data"][0]
            assert (described["id"], described["context_length"]) == ("tiny-llama", 64)
            assert "jaxinfer_slots 4.0" in server.get("/metrics").text
    assert not any(one.alive for one in batcher._serving.ring.processes)


def test_a_plan_of_another_model_is_refused(lm):
    other = ji.load("tiny-draft").config
    plan = plan_for(other, (Stage(0, 1, other.num_layers),))
    with pytest.raises(ValueError, match="the plan is for a model with"):
        check_plan(plan, lm.config)
