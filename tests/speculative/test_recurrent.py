"""A recurrent draft: the states it starts from, what it guesses, and how good its guesses are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.decode.sampling import Sampler, SamplerRows
from jaxinfer.models import stack
from jaxinfer.models.recurrent import guesses, read
from jaxinfer.speculative.acceptance_rates import measure_acceptance
from jaxinfer.speculative.proposal import Proposal
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.tuning import roofline, tune
from jaxinfer.testing.quick import quick_jit
from tests.factories import lm_of
from tests.speculative.running import DRAFTS, TARGET, TREE, Rows, cell, speculator

forward = quick_jit(stack.forward)
PROMPT = [1, 4, 1, 4, 2, 1]
GREEDY = Sampler(temperature=0.0)


@pytest.mark.parametrize("new", [5, 9])
def test_the_state_is_that_of_the_target_behind_the_last_token_that_it_read(new):
    rows = Rows(speculator("recurrent"), PROMPT, 3, new)
    tokens, state = rows.run(GREEDY, 0)
    text = np.concatenate([PROMPT, tokens[0]])
    hidden = forward(TARGET.config, TARGET.params, jnp.asarray(text)[None]).hidden
    np.testing.assert_allclose(state.speculation.drafter[0], hidden[0, -2], atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_step_leaves_the_state_of_the_last_node_that_it_kept(count):
    drafter = speculator("recurrent").drafter
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((1, TREE.nodes, 16), np.float32))
    path, old = jnp.asarray([[0, 1, 4, 7]]), jnp.full((1, 16), 9.0)
    unread = Proposal(path, path, path, path)
    kept = drafter.commit({}, TREE, old, None, unread, path, path, jnp.asarray([count]), hidden)
    expected = old[0] if count == 0 else hidden[0, path[0, count - 1]]
    np.testing.assert_array_equal(kept[0], expected)


def test_a_chain_is_what_the_cell_says_one_token_after_the_other():
    draft, spec = DRAFTS["recurrent"], speculator("recurrent", topology=Topology.chain(4))
    sampler = SamplerRows.of([GREEDY] * 2, 6)
    state, root = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16), np.float32)), [3, 1]
    seen, keys = jnp.zeros((2, 1), jnp.int32), jax.random.split(jax.random.key(0), 2)
    proposal, _ = spec.drafter.propose(
        draft.params, spec.topology, sampler, keys, state, jnp.asarray(root), seen
    )
    for row in range(2):
        z, token = state[row, None, None], root[row]
        for depth in range(1, 4):
            z = read(draft.params, z, jnp.asarray([[token]]))
            best = int(jnp.argmax(guesses(draft.params, z)))
            token = int(draft.params["draft_vocabulary"][best])
            assert int(proposal.tokens[row, depth]) == token


def test_children_in_a_tree_start_from_the_state_of_their_own_parent():
    draft, spec = DRAFTS["recurrent"], speculator("recurrent")
    sampler = SamplerRows.of([GREEDY], 6)
    state, seen = jnp.ones((1, 16)), jnp.zeros((1, 1), jnp.int32)
    proposal, _ = spec.drafter.propose(
        draft.params,
        TREE,
        sampler,
        jax.random.split(jax.random.key(0), 1),
        state,
        jnp.asarray([2]),
        seen,
    )
    for node in range(1, TREE.nodes):
        path = [node]
        while path[-1]:
            path.append(int(TREE.parent[path[-1]]))
        z = state[:, None]
        for above in path[:0:-1]:
            z = read(draft.params, z, proposal.tokens[:, above, None])
        order = jnp.argsort(-guesses(draft.params, z)[0, 0])
        expected = draft.params["draft_vocabulary"][order[int(TREE.rank[node])]]
        assert int(proposal.tokens[0, node]) == int(expected)


@pytest.mark.parametrize("blocks", [1, 2])
def test_acceptance_by_depth_is_that_of_the_cell_along_the_text(blocks):
    draft = cell(blocks=blocks)
    found = measure_acceptance(TARGET, draft, [PROMPT], GREEDY, new_tokens=20, width=3)
    (made,) = TARGET.generate([PROMPT], sampler=GREEDY, max_new_tokens=20)
    text = jnp.asarray([*PROMPT, *made.tokens])[None]
    hidden = forward(TARGET.config, TARGET.params, text).hidden
    hits = np.zeros((len(found.p), 3))
    for behind in range(len(PROMPT) - 1, text.shape[1] - 1):
        for depth in range(len(found.p)):
            first = behind - depth
            z = hidden[:, first - 1, None] if first > 0 else jnp.zeros((1, 1, 16))
            if first < 0:
                continue
            for token in text[0, first : behind + 1]:
                z = read(draft.params, z, token[None, None])
            order = jnp.argsort(-guesses(draft.params, z)[0, 0])[:3]
            hits[depth] += np.asarray(
                draft.params["draft_vocabulary"][order] == text[0, behind + 1]
            )
    np.testing.assert_allclose(np.asarray(found.p)[:5], hits[:5] / 20, atol=1e-6)


def test_tuning_takes_it_and_greedy_text_stays_the_same():
    draft, options = cell(), {"max_new_tokens": 24, "ignore_eos": True}
    tuned = tune(TARGET, draft, GREEDY, sizes=(2, 4), new_tokens=16, fresh=True)
    assert tuned.draft_ms > 0 and len(tuned.acceptance.p) > 1
    far = roofline(tuned, TARGET, draft, "h200")
    assert 0 < far.draft_ms < far.verify_ms[1] * 10
    spec = ji.speculate(TARGET, draft, TREE)
    prompts = [PROMPT, [2], [0, 3, 3]]
    expected = [one.tokens for one in TARGET.generate(prompts, **options)]
    assert [one.tokens for one in spec.generate(prompts, **options)] == expected


def test_a_draft_for_states_of_another_width_is_refused():
    with pytest.raises(ValueError, match="states of 16 numbers, the target has 32"):
        ji.speculate(lm_of(), cell(), TREE)
