"""Trees of fresh tokens: a root-to-leaf path equals a chain, its commit equals linear history."""

import pytest

from jaxinfer import testing
from tests.policies import settings

CASES = settings(("hard",))
LOSSLESS = [case for case in CASES if case.values[1].lossless_under_tree]


@pytest.mark.parametrize("model, policy", CASES)
def test_every_path_of_a_tree_equals_the_same_tokens_as_a_chain(model, policy):
    testing.check_tree_paths(policy, model)


@pytest.mark.parametrize("model, policy", LOSSLESS)
def test_a_ragged_commit_of_paths_continues_like_linear_history(model, policy):
    testing.check_tree_commit(policy, model)


@pytest.mark.parametrize("model, policy", CASES)
def test_a_rejected_tree_leaves_no_trace(model, policy):
    testing.check_rejected_tree(policy, model)
