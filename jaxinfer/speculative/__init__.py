"""Speculative decoding: trees, drafters, verification, and the choice of the tree."""

from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.acceptance_rates import measure_acceptance, online_acceptance
from jaxinfer.speculative.drafters import Drafter, Method, level_context, pass_order
from jaxinfer.speculative.drafts import early_exit
from jaxinfer.speculative.expected import expected_tokens, path_probabilities
from jaxinfer.speculative.grow import grow_tree
from jaxinfer.speculative.optimizer import Choice, choose
from jaxinfer.speculative.plan import SpeculativeRun
from jaxinfer.speculative.proposal import Proposal
from jaxinfer.speculative.speculate import speculate
from jaxinfer.speculative.speculator import Speculator, TreeChooser
from jaxinfer.speculative.step import Speculation, TreeStep
from jaxinfer.speculative.topology import Topology
from jaxinfer.speculative.tuning import Tuned, tune
from jaxinfer.speculative.verify import Rule, Verdict, verify

__all__ = [
    "Acceptance",
    "Choice",
    "Drafter",
    "Method",
    "Proposal",
    "Rule",
    "Speculation",
    "SpeculativeRun",
    "Speculator",
    "Topology",
    "TreeChooser",
    "TreeStep",
    "Tuned",
    "Verdict",
    "choose",
    "early_exit",
    "expected_tokens",
    "grow_tree",
    "level_context",
    "measure_acceptance",
    "online_acceptance",
    "pass_order",
    "path_probabilities",
    "speculate",
    "tune",
    "verify",
]
