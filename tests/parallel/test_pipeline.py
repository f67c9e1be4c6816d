"""Stages as processes: the texts of the model itself, also when processes are killed."""

import shutil
import time

import pytest

from jaxinfer.decode.batcher import Batcher
from jaxinfer.decode.sampling import Sampler
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.parallel.chaos import drill
from jaxinfer.parallel.journal import Journal
from jaxinfer.parallel.pipeline import Pipeline, StageShape, check_stages
from tests.decode import batching
from tests.decode.batching import assert_alike, random_requests

POLICIES = {"full": "full", "h2o": {"name": "h2o", "heavy": 6, "recent": 4}}
STAGES = (StageShape(range(1), 2), StageShape(range(1, 2)))


@pytest.fixture(scope="module", params=["full", pytest.param("h2o", marks=pytest.mark.slow)])
def served(request, tmp_path_factory):
    """A batcher over two processes, the first with two devices; and the model itself."""
    lm, policy = batching.model(), POLICIES[request.param]
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    save_checkpoint(folder, Checkpoint(lm.config, lm.params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # stages compile as quickly as we do
        pipeline = Pipeline(folder, STAGES, policy=policy, slots=4, context=64, chunk=16)
        pipeline.model.tokenizer = lm.tokenizer  # which has no file
        yield Batcher(pipeline), pipeline, lm, policy
        pipeline.close()
    assert not any(one.alive for one in pipeline.ring.processes)


def check(batcher, lm, policy, asked):
    tickets = [batcher.submit(one.prompt, **one.options) for one in asked]
    for one, ticket in zip(asked, tickets, strict=True):
        answer = ticket.result(timeout=240)
        assert_alike(answer, lm.generate([one.prompt], policy=policy, **one.options)[0])


def test_texts_are_those_of_the_model(served):
    batcher, pipeline, lm, policy = served
    check(batcher, lm, policy, random_requests(10, seed=1))
    assert len(pipeline.journal) == 0


def test_killed_stages_lose_and_change_nothing(served):
    """hexgen.md 5.5, at random moments."""
    batcher, pipeline, lm, policy = served
    prompts = [one.prompt for one in random_requests(6, seed=2)]
    found = drill(batcher, pipeline, prompts, kills=3, new_tokens=20, seed=0)
    assert found.passed and found.kills == 3 and found.requests >= 6, found
    assert 1 <= len(found.recovery_s) <= 3 and found.repairs >= len(found.recovery_s)
    assert found.to_dict()["passed"] and found.to_dict()["recovery_median_s"] > 0
    check(batcher, lm, policy, random_requests(3, seed=3))


def test_cancelled_requests_leave_nothing_behind(served):
    batcher, pipeline, _, _ = served
    tickets = [batcher.submit([1, 2, 3], max_new_tokens=40, ignore_eos=True) for _ in range(6)]
    next(iter(tickets[0]))
    for ticket in tickets:
        ticket.cancel()
    for ticket in tickets:
        assert ticket.result(timeout=60).finish_reason == "cancelled" if ticket.completion else True
    while batcher.running or batcher.waiting:
        time.sleep(0.01)
    assert len(pipeline.journal) == 0


def test_what_a_pipeline_cannot_do_is_refused(served):
    batcher, _, _, _ = served
    with pytest.raises(ValueError, match="does not give log-probabilities of a prompt"):
        batcher.submit([1], max_new_tokens=2, prompt_log_probs=True)
    with pytest.raises(ValueError, match="exceed the 64 of a slot"):
        batcher.submit([1] * 60, max_new_tokens=10)


def test_likeliest_tokens_and_least_lengths_are_served(served):
    batcher, _, lm, policy = served
    answer = batcher.submit(
        [5, 9], max_new_tokens=6, min_tokens=6, top_logprobs=3, sampler=Sampler(temperature=0.7)
    ).result(timeout=60)
    assert len(answer.tokens) == 6 and all(len(one) == 3 for one in answer.likeliest)
    best = [pairs[0][1] for pairs in answer.likeliest]
    assert all(a <= b + 1e-6 for a, b in zip(answer.log_probs, best, strict=True))


@pytest.mark.parametrize(
    "stages",
    [
        (), (StageShape(range(2)),), (StageShape(range(0, 2)), StageShape(range(3, 4))),
        (StageShape(range(1, 4)),), (StageShape(range(0)), StageShape(range(4))),
        (StageShape(range(4), 0),), (StageShape(range(5)),),
    ],
)  # fmt: skip
def test_stages_that_are_not_the_model_are_refused(stages):
    with pytest.raises(ValueError, match="stage"):
        check_stages(stages, 4)


def test_a_journal_knows_what_a_row_holds():
    journal = Journal()
    entry = journal.open("a", [1, 2, 3])
    assert entry.cached == 3
    entry.emitted += [4, 5]
    assert entry.cached == 4 and journal.of("a") is entry
    assert journal.open("b", [1]).number != entry.number
    journal.close("a")
    journal.close("a")
    assert len(journal) == 1


def test_a_stage_that_cannot_load_says_why(tmp_path):
    lm = batching.model()
    save_checkpoint(tmp_path / "m", Checkpoint(lm.config, lm.params))
    shutil.rmtree(tmp_path / "m" / "params" / "layers.1.mlp.up.weight")
    with pytest.raises(ValueError, match=r"stage 1 cannot serve: ValueError: .*layers\.1\.mlp\.up"):
        Pipeline(tmp_path / "m", STAGES, context=32)
