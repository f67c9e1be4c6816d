"""A decode loop is traced once, whatever its cache does in the course of it."""

import pytest

from jaxinfer import testing
from jaxinfer.cache.presets import full, h2o, kivi, streaming
from tests.factories import CONFIGS
from tests.policies import over, with_random_feature_maps

POLICIES = {  # state changes within a few steps
    "full": full(),
    "kivi": kivi(bits=4, group=8, residual=8),
    "streaming": streaming(sinks=2, window=6),
    "h2o": h2o(heavy=4, recent=4),
    "less": with_random_feature_maps(over(h2o(heavy=4, recent=4)), CONFIGS["llama"]),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_one_trace_serves_all_steps_lengths_and_requests(policy):
    testing.check_one_trace(policy, "llama")
