"""Speculative decoding draws from the target's own distribution, over many steps (arXiv
2402.12374, section 3.2 and appendix F)."""

import jax
import numpy as np
import pytest

from jaxinfer.decode.sampling import Sampler
from jaxinfer.speculative import step as step_module
from jaxinfer.speculative.topology import Topology
from tests.speculative.running import DRAFTS, TREE, Rows, compare, joint, speculator

PROMPT = (1, 4, 1, 4, 2, 1)
ROWS, REPEATS, JOINT = 4096, 8, 4
TEMPERATURES = (0.3, 0.7, 1.0)
slow = pytest.mark.slow
CASES = {  # draft, method, tree: temperatures of the default suite
    ("early exit", "sequoia", TREE): (0.3, 1.0),
    ("recurrent", "sequoia", TREE): (0.7,),
    ("lookup", "", Topology.k_chains(2, 3)): (1.0,),
    ("unrelated", "sequoia", TREE): (),
    ("early exit", "specinfer", TREE): (),
    ("early exit", "top-k", TREE): (),
    ("early exit", "naive", TREE): (),
    ("early exit", "sequoia", Topology.chain(4)): (),
}


def drawn(rows: Rows, sampler: Sampler, repeats: int = REPEATS) -> np.ndarray:
    return np.concatenate([rows.run(sampler, seed)[0] for seed in range(repeats)])[:, :JOINT]


def assert_same_distribution(tokens, sampler):
    distance, floor, z = compare(tokens, joint(sampler, PROMPT, JOINT))
    assert distance < 1.5 * floor and abs(z) < 4, (distance, floor, z)


@pytest.mark.parametrize(
    "draft, method, topology, temperature",
    [
        pytest.param(*case, temperature, marks=() if temperature in fast else slow)
        for case, fast in CASES.items()
        for temperature in TEMPERATURES
    ],
)
def test_four_tokens_over_several_steps_have_the_targets_joint_distribution(
    draft, method, topology, temperature
):
    rows = Rows(speculator(draft, method, topology), PROMPT, ROWS, JOINT + 1)
    sampler = Sampler(temperature=temperature)
    assert_same_distribution(drawn(rows, sampler), sampler)


@pytest.mark.parametrize(
    "method, sampler",
    [
        ("specinfer", Sampler(temperature=0.7)),
        ("top-k", Sampler(temperature=0.7)),
        ("naive", Sampler(temperature=0.9, top_p=0.7)),
        ("sequoia", Sampler(temperature=0.9, top_p=0.7, min_p=0.1)),
    ],
)
def test_every_method_is_exact_in_a_quarter_of_the_draws(method, sampler):
    rows = Rows(speculator("early exit", method), PROMPT, ROWS, JOINT + 1)
    assert_same_distribution(drawn(rows, sampler, REPEATS // 4), sampler)


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(Sampler(temperature=0.9, top_p=0.7), marks=slow),
        pytest.param(Sampler(temperature=1.0, top_k=3, min_p=0.1), marks=slow),
        Sampler(temperature=0.8, repetition_penalty=1.6, logit_bias={2: 1.0, 5: -np.inf}),
    ],
    ids=["top_p", "top_k and min_p", "penalty and bias"],
)
def test_filters_and_penalties_hold_at_every_node(sampler):
    rows = Rows(speculator("early exit"), PROMPT, ROWS, JOINT + 1)
    assert_same_distribution(drawn(rows, sampler), sampler)


def test_noise_that_is_used_again_in_the_next_step_is_seen_here(monkeypatch):
    """The test above has the power to find the defect of the original code."""
    monkeypatch.setattr(step_module, "step_keys", lambda requests, state: requests.keys)
    rows = Rows(speculator("early exit", topology=Topology.chain(3)), PROMPT, ROWS, JOINT + 1)
    sampler = Sampler(temperature=0.7)
    _, _, z = compare(drawn(rows, sampler), joint(sampler, PROMPT, JOINT))
    assert z > 8


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_a_draft_that_is_the_target_has_its_first_child_accepted(temperature):
    rows = Rows(speculator("itself"), PROMPT, 64, 9)
    _, state = rows.run(Sampler(temperature=temperature), 0)
    chosen = np.asarray(state.speculation.chosen).sum(axis=0)
    assert chosen[:, 1:].sum() == 0 and chosen[0, 0] > 0


def test_as_many_children_as_tokens_are_never_all_rejected():
    star = Topology.k_chains(6, 1)
    rows = Rows(speculator("unrelated", topology=star), PROMPT, 512, 9)
    _, state = rows.run(Sampler(temperature=1.0), 0)
    assert np.asarray(state.speculation.chosen)[:, 0, -1].sum() == 0


def test_a_row_draws_the_same_alone_and_beside_others():
    spec = speculator("early exit")
    prompts = [[1, 4, 2], [3, 3, 5, 0, 1], [2]]
    options = {"sampler": Sampler(temperature=1.0), "max_new_tokens": 12, "ignore_eos": True}
    together = spec.generate(prompts, seed=[4, 5, 6], **options)
    for prompt, seed, expected in zip(prompts, (4, 5, 6), together, strict=True):
        assert spec.generate([prompt], seed=seed, **options)[0].tokens == expected.tokens


def test_rows_that_are_greedy_stay_so_beside_rows_that_draw():
    spec = speculator("early exit")
    prompts = [[1, 4, 2], [3, 3, 5, 0, 1]]
    options = {"max_new_tokens": 12, "ignore_eos": True}
    samplers = [Sampler(temperature=0.0), Sampler(temperature=1.0)]
    mixed = spec.generate(prompts, sampler=samplers, **options)
    assert mixed[0].tokens == spec.target.generate([prompts[0]], **options)[0].tokens


def test_drafts_share_the_arrays_of_an_early_exit():
    target, draft = speculator("early exit").target, DRAFTS["early exit"]
    assert draft.params["embed"]["tokens"] is target.params["embed"]["tokens"]
    assert (
        jax.tree.leaves(draft.params["layers"][0])[0]
        is jax.tree.leaves(target.params["layers"][0])[0]
    )
