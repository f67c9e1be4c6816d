"""Checks that a cache policy keeps what it promises, for policies of any package.

    from jaxinfer import testing
    from my_package import my_policy

    def test_my_policy():
        testing.check_policy(
            easy=lambda: my_policy(budget=64),   # loses nothing within 24 tokens
            hard=lambda: my_policy(budget=4),    # evicts or approximates within 20
            large=lambda: my_policy(budget=8192),
        )

Each check is a plain function that raises an AssertionError and works under any test runner.
"""

from jaxinfer.testing.chains import (
    check_bytes,
    check_chunks,
    check_full_budget,
    check_growth,
    check_idle_rows,
    check_ragged_rows,
)
from jaxinfer.testing.compare import assert_close, assert_same
from jaxinfer.testing.decoding import (
    check_equal_policies,
    check_no_copies,
    check_one_trace,
    check_speculation,
)
from jaxinfer.testing.models import CONFIGS, random_tokens, tiny_model
from jaxinfer.testing.policy import check_policy
from jaxinfer.testing.stepper import Stepper
from jaxinfer.testing.trees import check_rejected_tree, check_tree_commit, check_tree_paths

__all__ = [
    "CONFIGS",
    "Stepper",
    "assert_close",
    "assert_same",
    "check_bytes",
    "check_chunks",
    "check_equal_policies",
    "check_full_budget",
    "check_growth",
    "check_idle_rows",
    "check_no_copies",
    "check_one_trace",
    "check_policy",
    "check_ragged_rows",
    "check_rejected_tree",
    "check_speculation",
    "check_tree_commit",
    "check_tree_paths",
    "random_tokens",
    "tiny_model",
]
