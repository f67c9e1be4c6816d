"""Weights in host memory give the same text, plainly and under speculation."""

from typing import Any

import jax
import pytest

import jaxinfer as ji
from jaxinfer.models import offload
from jaxinfer.speculative.topology import Topology
from tests.factories import lm_of

NEW = {"max_new_tokens": 12, "ignore_eos": True}
PROMPTS = [[3, 1, 4], [1, 5, 9, 2]]


def spaces(lm) -> list[Any]:
    return [jax.typeof(jax.tree.leaves(layer)[0]).memory_space for layer in lm.params["layers"]]


@pytest.mark.parametrize("stay", [0, 1])
def test_offloaded_weights_give_the_same_tokens(stay):
    lm = lm_of()
    away = lm.offloaded(stay)
    assert spaces(away) == [jax.memory.Space.Device] * stay + [jax.memory.Space.Host] * (2 - stay)
    assert jax.typeof(away.params["embed"]["tokens"]).memory_space == jax.memory.Space.Device
    assert spaces(lm) == [jax.memory.Space.Device] * 2
    expected = [out.tokens for out in lm.generate(PROMPTS, **NEW)]
    assert [out.tokens for out in away.generate(PROMPTS, **NEW)] == expected


def test_a_draft_on_the_device_speculates_for_a_target_in_host_memory():
    lm = lm_of()
    spec = ji.speculate(lm.offloaded(), ji.early_exit(lm, 1), Topology.from_children([[[]], []]))
    expected = [out.tokens for out in lm.generate(PROMPTS, **NEW)]
    assert [out.tokens for out in spec.generate(PROMPTS, **NEW)] == expected


def test_the_estimate_counts_what_crosses_the_bus():
    lm = lm_of()
    layer = sum(x.nbytes for x in jax.tree.leaves(lm.params["layers"][0]))
    assert offload.transfer_seconds(lm.params) == 0
    assert offload.transfer_seconds(lm.offloaded(1).params, 1e9) == pytest.approx(layer / 1e9)


def test_impossible_offloading_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="stay must be a whole number from 0 to 2, got 3"):
        lm_of().offloaded(3)

    class Bare:
        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "devices", lambda: [Bare()])
    with pytest.raises(ValueError, match="no page-locked host memory"):
        lm_of().offloaded()
