"""Rows join and leave a running state under every policy, with 8-bit weights, and with a draft."""

from dataclasses import replace

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.cache.presets import full, h2o, kivi, per_layer, streaming
from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.serving import Serving
from jaxinfer.decode.token_mask import allows, allows_any, mask_of
from jaxinfer.lm import LM
from jaxinfer.models.quantize import quantize_weights
from tests.decode.batching import CFG, Asked, Every, assert_alike, model, serve
from tests.factories import params_of
from tests.policies import over, with_random_feature_maps

WARM = Sampler(temperature=1.3)
ASKED = [
    Asked([4, 9, 2, 30, 8], WARM, 14, 1),
    Asked([1], WARM, 3, 2),
    Asked(list(range(20, 45)), WARM, 16, 3),
    Asked([17, 5], WARM, 9, 4),
]
ARRIVALS = [0, 1, 2, 3]
TREE = ji.Topology.from_children([[[]], []])
slow = pytest.mark.slow
POLICIES = {
    "full": full(),
    "kivi4": kivi(bits=4, group=8, residual=8),
    "kivi by blocks": kivi(bits=4, group=8, residual=8, value_flush="block"),
    "streaming": streaming(sinks=2, window=6),
    "streaming-kivi": streaming(2, 16, bits=4, group=8, residual=8),
    "h2o": h2o(heavy=4, recent=3),
    "h2o of a share": h2o(heavy=0.2, recent=0.2),
    "per layer": per_layer([h2o(heavy=4, recent=3), kivi(bits=4, group=8, residual=8)]),
}


def check(lm: LM, policy, draft=None, sampler: Sampler = WARM) -> None:
    serving = Serving(lm, policy, draft, slots=2, context=64, chunk=16)
    before = lm.engine.programs["insert"].traces
    asked = [replace(one, sampler=sampler) for one in ASKED]
    tickets = serve(serving, asked, ARRIVALS)
    # A draft changes no text that is not drawn.
    draft = draft if sampler.temperature else None
    for one, ticket in zip(asked, tickets, strict=True):
        expected = lm.generate(one.prompt, policy=policy, draft=draft, **one.options)[0]
        assert_alike(ticket.result(0), expected)
    assert lm.engine.programs["insert"].traces == before + 1


@slow
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_rows_that_join_and_leave_are_as_alone(policy):
    check(model(), policy)


@slow
def test_rows_join_and_leave_less():
    check(model(), with_random_feature_maps(over(h2o(heavy=4, recent=3)), CFG))


@slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rows_join_and_leave_with_low_bit_weights(weights):
    lm = model()
    check(LM(CFG, quantize_weights(params_of("llama"), weights), lm.tokenizer), full())


def test_rows_join_and_leave_with_a_policy_per_layer_and_a_tree_each():
    lm = model()
    policy = per_layer([kivi(bits=4, group=8, residual=8, value_flush="block"), full()])
    draft = ji.speculate(lm, ji.early_exit(lm, 1), TREE)
    check(lm, policy, draft, Sampler())


@slow
@pytest.mark.parametrize(
    "extras",
    [
        lambda: {"constraint": Every(lambda token: token % 2 == 0)},
        lambda: {"min_tokens": 9},
        lambda: {"top_logprobs": 4},
    ],
)
def test_what_holds_for_a_token_holds_inside_a_tree(extras):
    lm = model()
    asked = replace(ASKED[0], sampler=Sampler(logit_bias={7: 5.0}))
    plain, fast = (
        serve(Serving(lm, full(), draft, slots=1, context=64, chunk=16), [asked], [0], **extras())
        for draft in (None, ji.speculate(lm, ji.early_exit(lm, 1), TREE))
    )
    assert_alike(fast[0].result(0), plain[0].result(0))
    listed = [
        [[token for token, _ in one] for one in x[0].result(0).likeliest] for x in (plain, fast)
    ]
    assert listed[0] == listed[1]


@slow
@pytest.mark.parametrize("policy", [full(), POLICIES["kivi by blocks"]])
def test_rows_draw_from_a_tree_each(policy):
    lm = model()
    check(lm, policy, ji.speculate(lm, ji.early_exit(lm, 1), TREE))


@slow
@pytest.mark.parametrize("policy", [full(), POLICIES["kivi by blocks"]])
def test_rows_join_and_leave_with_prompt_lookup(policy):
    lm = model()
    check(lm, policy, ji.speculate(lm, "prompt-lookup", ji.Topology.chain(4)))


def test_masks_of_tokens():
    words = np.zeros(2, np.uint32)
    words[1] = 1 << 31 | 1 << 3
    found = mask_of(words, 64)
    assert found.dtype == np.int32 and [t for t in range(64) if allows(found, t)] == [35, 63]
    assert allows_any(found, 36) and not allows_any(found, 35)
    for wrong, vocab in ((words, 35), (words, 65), (words.astype(np.int64), 64), (5, 64)):
        with pytest.raises(ValueError, match="a mask of tokens"):
            mask_of(wrong, vocab)
