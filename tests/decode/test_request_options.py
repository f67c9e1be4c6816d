"""Options per prompt, and options that are wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.model import rows_of
from jaxinfer.decode.options import Options
from jaxinfer.decode.sampling import Sampler
from jaxinfer.lm import LM
from tests.factories import lm_of, scripted_lm

PIECES = [bytes([c]) for c in b"abcdefghij"]


@pytest.fixture(scope="module")
def lm() -> LM:
    return scripted_lm(PIECES)


@pytest.mark.parametrize(
    "stop, expected",
    [
        (None, ["bcdefghij", "cdefghij"]),
        ("e", ["bcd", "cd"]),
        (["f", "e"], ["bcd", "cd"]),
        (("f", "h"), ["bcde", "cde"]),
        ([["e"], ["g", "f"]], ["bcd", "cde"]),
        (["e", []], ["bcd", "cdefghij"]),
        ([[], "g"], ["bcdefghij", "cdef"]),
    ],
)
def test_stop_strings_are_for_all_prompts_or_one_entry_each(lm, stop, expected):
    outs = lm.generate(["a", "b"], max_new_tokens=30, stop=stop)
    assert [out.text for out in outs] == expected


def test_ignore_eos_may_differ_by_prompt(lm):
    outs = lm.generate(["a", "b"], max_new_tokens=20, ignore_eos=[True, False])
    assert [out.finish_reason for out in outs] == ["length", "eos"]
    assert [len(out.tokens) for out in outs] == [20, 9]


def test_samples_of_a_prompt_share_its_options(lm):
    outs = lm.generate(
        ["a", "b"], samples=2, max_new_tokens=[4, 20], stop=[["d"], []], ignore_eos=[False, True]
    )
    assert [out.finish_reason for out in outs] == ["stop", "stop", "length", "length"]
    assert [len(out.tokens) for out in outs] == [3, 3, 20, 20]


def test_arrays_are_lists_of_options(lm):
    expected = lm.generate(["a", "b"], max_new_tokens=[2, 3], seed=[4, 5])
    for array in (tuple, np.asarray, jnp.asarray):
        outs = lm.generate(
            ["a", "b"], max_new_tokens=array([2, 3]), seed=array([4, 5]), samples=np.int64(1)
        )
        assert [out.tokens for out in outs] == [out.tokens for out in expected]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop": 5}, "stop must be a string or a list of strings, .* got 5"),
        ({"stop": ["x", 5]}, "stop must be a string or a list"),
        ({"stop": np.array("x")}, "stop must be a string or a list"),
        ({"stop": b"x"}, "stop must be a string or a list"),
        ({"stop": [["x"], ["y"]]}, "stop has 2 entries for 1 prompts"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, .* got 2.5"),
        ({"max_new_tokens": [None]}, r"max_new_tokens must be a whole number, .* got \[None\]"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 2**31}, "max_new_tokens must be from 1 to 1073741824"),
        ({"samples": 2.0}, "samples must be a whole number from 1 to .*, got 2.0"),
        ({"samples": None}, "samples must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"ignore_eos": "yes"}, "ignore_eos must be True or False"),
        ({"ignore_eos": [True, False]}, "ignore_eos has 2 entries for 1 prompts"),
        ({"sampler": "greedy"}, "sampler must be a Sampler"),
        ({"prefix": "text"}, "prefix is not a session of this model; start one"),
    ],
)
def test_wrong_options_are_refused_with_a_value_error(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(["a"], **options)
    with pytest.raises(ValueError):
        lm.stream("a", **options)


@pytest.mark.parametrize("prompts", [5, None, 1.5])
def test_what_is_no_prompt_is_refused_with_a_value_error(prompts):
    with pytest.raises(ValueError, match=f"prompts must be texts or lists of .* got {prompts}"):
        rows_of(prompts)


@pytest.mark.parametrize("wrong", [[1.5], [[1], [2]], ["x"]])
def test_what_are_no_tokens_is_refused_with_a_value_error(wrong):
    with pytest.raises(ValueError, match="a prompt must be a text or a list of token ids, got "):
        lm_of().generate([np.array(wrong)])


def test_integer_arrays_are_token_lists():
    lm, tokens = lm_of(), [3, 1, 4, 1, 5]
    expected = lm.generate(tokens, max_new_tokens=4)[0].tokens
    session = lm.session()
    assert session.generate(jnp.asarray(tokens), max_new_tokens=4).tokens == expected
    for prompts in (jnp.asarray(tokens), np.asarray(tokens), np.asarray([tokens])):
        assert [out.tokens for out in lm.generate(prompts, max_new_tokens=4)] == [expected]


def test_equal_prompts_with_neighbouring_seeds_have_different_samples():
    warm = Sampler(temperature=1.5)
    lm = lm_of()
    outs = lm.generate([[1, 2]] * 2, seed=[0, 1], samples=2, max_new_tokens=12, sampler=warm)
    assert len({tuple(out.tokens) for out in outs}) == 4


def test_the_first_sample_is_what_one_sample_gives():
    options = {"max_new_tokens": 12, "sampler": Sampler(temperature=1.5), "seed": 3}
    lm = lm_of()
    found = lm.generate([[1, 2]], samples=3, **options)
    assert found[0].tokens == lm.generate([[1, 2]], **options)[0].tokens
    assert found[1].tokens == lm.generate([[1, 2]], samples=2, **options)[1].tokens


def test_the_options_of_no_prompt_are_none():
    assert Options(seed=[]).per_prompt(0) == []
