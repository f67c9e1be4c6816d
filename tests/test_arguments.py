"""Odd arguments of every public call: one line that names the argument and what was given."""

import itertools
import math

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer import arguments
from jaxinfer.models.quantize import quantize_params
from tests.factories import lm_of, random_tokens

pytestmark = pytest.mark.usefixtures("unchecked")
ODD = [
    None,
    5,
    -1,
    2**63,
    0.5,
    math.nan,
    math.inf,
    "x",
    b"x",
    [],
    [[]],
    {},
    {"a": 1},
    {1},
    object(),
]
ODD += [object(), True, np.zeros((2, 2)), np.array(3.5), np.array(["a"]), len, (x for x in "ab")]
ODD += ["x" * 5000, "\x1b[2J", "\ud800", 10**5000, [10**5000], itertools.count()]


@pytest.fixture
def unchecked(monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


CALLS = {
    "policy of a session": lambda x: lm_of().session(x),
    "policy of a generation": lambda x: lm_of().generate([1, 2], policy=x, max_new_tokens=0),
    "policies": lambda x: ji.per_layer(x),
    "prompts": lambda x: lm_of().generate(x, max_new_tokens=0),
    "prompt": lambda x: lm_of().encode(x),
    "text to score": lambda x: lm_of().score(x, chunk=-1),
    "chunk": lambda x: lm_of().score([1, 2], chunk=[x]),
    "tokens": lambda x: lm_of().logits([x]),
    "stop": lambda x: lm_of().generate([1, 2], stop=[x, 1], max_new_tokens=0),
    "draft": lambda x: lm_of().generate([1, 2], draft=[x]),
    "prefix": lambda x: lm_of().generate([1, 2], prefix=[x]),
    "topology": lambda x: ji.speculate(lm_of(), "prompt-lookup", [x]),
    "method": lambda x: ji.speculate(lm_of(), "prompt-lookup", method=x),
    "support": lambda x: ji.speculate(lm_of(), "prompt-lookup", support=[x]),
    "target": lambda x: ji.speculate(x, "prompt-lookup"),
    "source": lambda x: ji.load([x]),
    "weights": lambda x: ji.load("tiny-llama", weights=[x]),
    "dtype": lambda x: ji.load("tiny-llama", dtype=[x]),
    "implementation": lambda x: ji.load("tiny-llama", implementation=[x]),
    "progress": lambda x: ji.load("tiny-llama", progress=[x]),
    "lm of an early exit": lambda x: ji.early_exit(x, 1),
    "layers": lambda x: ji.early_exit(lm_of(), [x]),
    "target of a draft": lambda x: ji.load_draft(x, "prompt-lookup"),
    "source of a draft": lambda x: ji.load_draft(lm_of(), [x]),
    "window": lambda x: ji.streaming(window=[x]),
    "positions": lambda x: ji.streaming(positions=[x]),
    "quantized window": lambda x: ji.streaming(window=256, bits=4, residual=[x]),
    "heavy": lambda x: ji.h2o(heavy=[x]),
    "bits": lambda x: ji.kivi(bits=[x]),
    "group": lambda x: ji.kivi(group=[x]),
    "residual": lambda x: ji.kivi(residual=[x]),
    "value_flush": lambda x: ji.kivi(value_flush=[x]),
    "flush_order": lambda x: ji.kivi(flush_order=[x]),
    "feature maps": lambda x: ji.less("h2o", [x]),
    "parents": lambda x: ji.Topology([x]),
    "parents in any order": lambda x: ji.Topology.from_parents([x]),
    "nodes": lambda x: ji.Topology.optimal([0.5], [x]),
    "levels": lambda x: ji.Topology.optimal([0.5], 4, levels=[x]),
    "branching": lambda x: ji.Topology.optimal([0.5], 4, branching=[x]),
    "acceptance": lambda x: ji.Topology.optimal({"p": x}, 4),
    "chain": lambda x: ji.Topology.chain([x]),
    "chains": lambda x: ji.Topology.k_chains(2, [x]),
    "tree of a file": lambda x: ji.Topology.load([x]),
    "tree": lambda x: ji.expected_tokens([x], [0.5]),
    "path of a session": lambda x: lm_of().restore([x]),
    "stay": lambda x: lm_of().offloaded([x]),
    "prompt lengths": lambda x: lm_of().warmup([[x]]),
    "batch": lambda x: lm_of().warmup([4], batch=[x]),
    "format": lambda x: quantize_params(lm_of().config, lm_of().params, [x]),
    "factory": lambda x: ji.register_policy("odd", [x]),
}
"""Calls that refuse whatever they are given; most wrap it, so that nothing is right by chance."""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_odd_arguments_are_refused_in_one_line(call):
    for value in ODD:
        try:
            call(value)
        except ValueError as error:
            line = str(error)
            assert line.isprintable() and 0 < len(line) < 1000, line
        except OSError:
            pass


def test_rows_of_prompts_are_what_they_were():
    lm = lm_of()
    tokens = random_tokens(2, 4)
    rows = lm.generate(tokens, max_new_tokens=1)
    again = lm.generate(tokens.tolist(), max_new_tokens=1)
    assert [one.tokens for one in rows] == [one.tokens for one in again]
    assert lm.generate([]) == []
    assert lm.logits(tokens).shape == lm.logits(tokens.tolist()).shape == (2, 4, 61)


@pytest.mark.parametrize(
    "tokens", [[[1.0, 2.0]], [[True, False]], [[1], [2, 3]], [[61]], [[-1]], [1, 2], [[]]]
)
def test_logits_take_rows_of_the_vocabulary_only(tokens):
    with pytest.raises(ValueError, match="tokens must be"):
        lm_of().logits(tokens)


@pytest.mark.parametrize(
    "prompt", [b"ab", {1, 2}, {"a": 1}, [True, False], [1.5], [[1, 2]], [2**70]]
)
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match=r"prompt must be|outside the vocabulary"):
        lm_of().encode(prompt)


def test_what_was_given_is_shown_on_one_short_line():
    for value in ODD:
        assert len(arguments.shown(value)) <= 120 and arguments.shown(value).isprintable()
    assert arguments.shown(2**70) == "1180591620717411303424"
    assert "bits" in arguments.shown(10**5000)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, math.nan, -1, 2**31, np.array([1, 2])])
def test_no_whole_number(value):
    with pytest.raises(ValueError, match="n must be a whole number from 0 to 2147483647, got"):
        arguments.whole("n", value, least=0)


def test_numbers_of_numpy_are_numbers():
    assert arguments.whole("n", np.int64(3)) == 3
    assert arguments.real("x", np.float32(0.5)) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True, 1j, 10**400])
def test_no_real_number(value):
    with pytest.raises(ValueError, match="x must be a number from 0 to 9, got"):
        arguments.real("x", value, least=0, most=9)


def test_a_search_for_a_tree_that_would_take_minutes_is_refused():
    with pytest.raises(ValueError, match="ask for fewer nodes, levels or ranks"):
        ji.Topology.optimal([0.01] * 60, nodes=4096, levels=2000)
