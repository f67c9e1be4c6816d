"""Speculation as users meet it: the same text as plain decoding, whatever draft, tree or policy."""

import re
import warnings

import jax.numpy as jnp
import pytest

import jaxinfer as ji
from jaxinfer.cache.policy import Cache
from jaxinfer.decode.sampling import Sampler
from jaxinfer.speculative.step import acceptable
from jaxinfer.speculative.topology import Topology
from tests.factories import lm_of, random_tokens, scripted_lm
from tests.policies import settings, with_random_feature_maps
from tests.speculative.running import TREE

PROMPTS = [random_tokens(1, n, seed=n)[0].tolist() for n in (12, 7, 3, 10)]
NEW = {"max_new_tokens": 40, "ignore_eos": True}
PIECES = [b"Hello", b", ", b"wor", b"ld: ", b" ST", b"OP", b" and", b" more", b"."]


@pytest.fixture(scope="module")
def plain():
    """The text of plain greedy decoding, a prompt at a time."""
    return [lm_of().generate([prompt], **NEW)[0].tokens for prompt in PROMPTS]


@pytest.mark.parametrize(
    "draft, topology",
    [
        ("exit", TREE),
        ("itself", TREE),
        ("prompt-lookup", Topology.k_chains(2, 3)),
        pytest.param("unrelated", TREE, marks=pytest.mark.slow),
        pytest.param("prompt-lookup", Topology.chain(5), marks=pytest.mark.slow),
        pytest.param("exit", Topology.chain(2), marks=pytest.mark.slow),
    ],
)
def test_greedy_text_of_a_ragged_batch_is_that_of_plain_decoding(draft, topology, plain):
    lm = lm_of()
    drafts = {"exit": ji.early_exit(lm, 1), "itself": lm, "unrelated": lm_of(seed=3)}
    spec = ji.speculate(lm, drafts.get(draft, draft), topology)
    outs = spec.generate(PROMPTS, **NEW)
    assert [out.tokens for out in outs] == plain
    stats = outs[0].stats
    assert sum(stats.step_tokens) * stats.tokens_per_step == pytest.approx(4 * 39)
    if draft == "itself":
        assert stats.tokens_per_step > 3.8  # of 4 levels; the last step is cut short


POLICIES = [case for case in settings(("hard",)) if case.id.startswith("llama-")]
FAST = ("kivi-block", "-streaming-hard")


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(
            case.values[1],
            id=case.id,
            marks=() if any(name in case.id for name in FAST) else pytest.mark.slow,
        )
        for case in POLICIES
    ],
)
def test_every_policy_keeps_its_promise_under_trees(policy):
    """KIVI with flushes by blocks stops at its horizon; others say that they may differ."""
    lm = lm_of()
    policy = with_random_feature_maps(policy, lm.config)
    if policy.lossless_under_tree:
        # A draft under the same policy agrees, so that paths are long and meet every flush.
        spec = ji.speculate(lm, lm, TREE, policy=policy)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outs = spec.generate(PROMPTS, policy=policy, **NEW)
        expected = lm.generate(PROMPTS, policy=policy, **NEW)
        assert [out.tokens for out in outs] == [out.tokens for out in expected]
        assert outs[0].stats.tokens_per_step > 1.5
    else:
        with pytest.warns(UserWarning, match="may differ from plain decoding"):
            outs = ji.speculate(lm, lm, TREE).generate(PROMPTS, policy=policy, **NEW)
        assert all(len(out.tokens) == 40 for out in outs)


def test_layers_that_flush_apart_stop_a_step_at_the_nearest_flush():
    def block(residual: int):
        return ji.kivi(4, group=8, residual=residual, value_flush="block")

    policies, length = [block(16), block(8)], jnp.asarray([0, 5, 7, 15])
    for order in (policies, policies[::-1]):
        cache = Cache(length=length, layers=(), policies=tuple(order))
        # below the root, which is committed too: to a flush at 8 or 16 tokens, or the tree's end
        assert acceptable(Topology.chain(6), cache).tolist() == [5, 2, 0, 0]
    spec = ji.speculate(lm_of(), lm_of(), Topology.chain(6), policy=policies)
    outs = spec.generate(PROMPTS, policy=policies, **NEW)
    expected = lm_of().generate(PROMPTS, policy=policies, **NEW)
    assert [out.tokens for out in outs] == [out.tokens for out in expected]


@pytest.fixture(scope="module")
def scripted():
    lm = scripted_lm(PIECES)
    return lm, ji.speculate(lm, lm, Topology.chain(4))


def test_eos_inside_a_step_ends_the_text(scripted):
    lm, spec = scripted
    for prompt in ("Hello", " more", " and"):
        ours, theirs = (one.generate(prompt, max_new_tokens=30)[0] for one in (spec, lm))
        assert ours.tokens == theirs.tokens and ours.finish_reason == "eos"
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6])
def test_the_limit_cuts_a_step(scripted, limit):
    lm, spec = scripted
    ours, theirs = (one.generate("Hello", max_new_tokens=limit)[0] for one in (spec, lm))
    assert ours.tokens == theirs.tokens and ours.finish_reason == "length"


def test_nothing_behind_a_stop_string_is_kept(scripted):
    lm, spec = scripted
    ours, theirs = (one.generate("Hello", stop="STOP", max_new_tokens=30)[0] for one in (spec, lm))
    assert ours.text == theirs.text == ", world:  " and ours.finish_reason == "stop"
    assert ours.tokens == theirs.tokens and len(ours.log_probs) == len(ours.tokens)


def test_a_stream_joins_to_the_generated_text(scripted):
    lm, spec = scripted
    assert "".join(spec.stream("Hello", max_new_tokens=30)) == lm.generate("Hello")[0].text


def test_a_session_goes_on_behind_a_speculative_turn(scripted):
    lm, spec = scripted
    for stop in ("", "STOP"):
        ours, theirs = lm.session(), lm.session()
        first = ours.generate("Hello", draft=spec, max_new_tokens=5, stop=stop)
        assert first.tokens == theirs.generate("Hello", max_new_tokens=5, stop=stop).tokens
        assert ours.tokens + ours.pending == theirs.tokens + theirs.pending
        again = ours.generate("wor", draft=spec, max_new_tokens=8)
        assert again.tokens == theirs.generate("wor", max_new_tokens=8).tokens


def test_a_fixed_cache_streams_without_end():
    lm = scripted_lm([b"a", b"b"])
    spec = ji.speculate(lm, lm, Topology.chain(3))
    stream = spec.stream(
        "a", policy=ji.streaming(2, 6), max_new_tokens=None, ignore_eos=True,
        sampler=Sampler(temperature=1.0, logit_bias={3: -1e9, 2: -1e9}),
    )  # fmt: skip
    text = "".join(piece for piece, _ in zip(stream, range(60), strict=False))
    assert len(text) > 100 and set(text) <= {"a", "b"}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda lm: ji.speculate(lm, "small"), 'draft must be a model or "prompt-lookup"'),
        (lambda lm: ji.speculate(lm, 3), "draft must be an LM"),
        (lambda lm: ji.speculate(lm, lm, "tree"), "topology must be a Topology"),
        (
            lambda lm: ji.speculate(lm, lm, method="best"),
            "method must be one of 'sequoia', 'specinfer', 'top-k', 'naive'; got 'best'",
        ),
        (lambda lm: ji.speculate(lm, "prompt-lookup", TREE), "cannot fill this tree"),
        (lambda lm: ji.speculate(lm, lm, Topology.k_chains(9, 1), support=8), "has 9 children"),
        (lambda lm: ji.early_exit(lm, 2), "an early exit of 2 layers has 1 to 1"),
        (lambda lm: ji.speculate(lm, scripted_lm([b"a"])), "needs the target's tokenizer"),
        (
            lambda lm: lm_of(seed=3).generate([[1]], draft=ji.speculate(lm, lm, TREE)),
            "made for another model",
        ),
        (
            lambda lm: lm.generate(
                [[1]],
                policy=ji.streaming(2, 6),
                max_new_tokens=None,
                draft=ji.speculate(lm, "prompt-lookup", Topology.chain(3)),
            ),
            "remembers the whole text",
        ),
        (
            lambda lm: ji.speculate(lm, lm, TREE, policy="h2o").generate([[1, 2]]),
            "grows level by level",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(lm_of())
