"""Speculative decoding: trees, drafters, verification, and the choice of the tree."""

from jaxinfer.speculative.acceptance import Acceptance
from jaxinfer.speculative.expected import expected_tokens
from jaxinfer.speculative.topology import Topology

__all__ = ["Acceptance", "Topology", "expected_tokens"]
