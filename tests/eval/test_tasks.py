"""Passkey, lines, recall and ROUGE: their generators, and that they score what they say."""

import functools
import re

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.eval import (
    best_candidate,
    candidate_log_probs,
    continuation_rouge,
    greedy_match,
    line_retrieval,
    make_passkey,
    make_queries,
    make_recall,
    passkey,
    recall,
    rouge,
)
from jaxinfer.eval.passkey import solve
from jaxinfer.lm import LM
from tests.factories import BASE, lm_of, params_of, random_tokens, scripted_lm


class CharTokenizer:
    """Printable ASCII, a character a token; no BOS."""

    chat_template, vocab_size = None, 61

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [ord(letter) % 61 for letter in text]

    def decode(self, ids, skip_special: bool = True) -> str:
        return "".join(chr(65 + i % 26) if i % 5 else " " for i in ids)

    def apply_chat_template(self, messages, *_) -> str:
        raise NotImplementedError("characters have no template")

    encode_chat = apply_chat_template


@functools.cache
def spelling_lm() -> LM:
    """A random model that reads characters."""
    return LM(BASE, params_of("llama"), CharTokenizer(), name="spelling")


@functools.cache
def told_lm() -> LM:
    """A model that always goes on with the next piece of a fixed text."""
    return scripted_lm([b"the ", b"key ", b"is", b" 12345", b" 54321", b" end", b" 11111"])


def test_candidates_are_ranked_by_their_log_probabilities_and_leave_the_session_alone():
    lm, tokens = lm_of(), random_tokens(1, 40)[0].tolist()
    session = lm.session()
    session.append(tokens[:30])
    candidates = [tokens[30:33], tokens[33:36], tokens[36:37]]
    found = candidate_log_probs(session, candidates)
    for candidate, value in zip(candidates, found, strict=True):
        (score,) = lm.score([tokens[:30] + candidate])
        np.testing.assert_allclose(value, sum(score.log_probs[29:]), rtol=1e-4)
    assert candidate_log_probs(session, candidates) == found
    assert session.tokens + session.pending == tokens[:30]


def test_a_scripted_model_picks_the_right_candidate():
    session = told_lm().session()
    session.append("the key is")
    candidates = [" 54321", " 11111", " 12345"]
    assert best_candidate(session, candidates) == 2
    assert [greedy_match(session, one) for one in candidates] == [False, False, True]


def test_a_greedy_match_is_what_generation_writes():
    lm, prompt = lm_of(), random_tokens(1, 20)[0].tolist()
    written = lm.generate(prompt, max_new_tokens=5, ignore_eos=True)[0].tokens
    session = lm.session()
    session.append(prompt)
    assert greedy_match(session, written)
    assert not greedy_match(session, [*written[:-1], (written[-1] + 1) % 61])


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_passkey_stands_at_its_depth_in_a_prompt_of_the_length(depth):
    lm = spelling_lm()
    task = make_passkey(lm, 1500, depth, seed=3)
    assert task == make_passkey(lm, 1500, depth, seed=3)
    assert task != make_passkey(lm, 1500, depth, seed=4)
    key = task.candidates[task.answer].strip()
    assert len(set(task.candidates)) == 10 and task.prompt.count(key) == 2
    assert 1400 < len(lm.encode(task.prompt)) <= 1500
    assert task.prompt.index(key) / len(task.prompt) == pytest.approx(depth, abs=0.16)


def test_a_passkey_prompt_without_room_is_refused():
    with pytest.raises(ValueError, match="no room"):
        make_passkey(spelling_lm(), 40, 0.5)
    with pytest.raises(ValueError, match="depth"):
        make_passkey(spelling_lm(), 1000, 1.5)


def test_passkey_tables_have_a_cell_for_every_length_and_depth():
    cells = passkey(
        spelling_lm(), ji.streaming(4, 124), lengths=(500, 600), depths=(0.0, 1.0), samples=2
    )
    assert [(c.length, c.depth) for c in cells] == [(500, 0.0), (500, 1.0), (600, 0.0), (600, 1.0)]
    assert all(0 <= cell.accuracy <= 1 and cell.samples == 2 for cell in cells)


def test_the_passkey_scorer_uses_the_policy_it_is_given():
    lm = spelling_lm()
    task = make_passkey(lm, 500, 0.0)
    session = lm.session(ji.streaming(4, 60))
    session.append(lm.encode(task.prompt))
    expected = best_candidate(session, task.candidates) == task.answer
    assert solve(lm, ji.streaming(4, 60), task) == expected
    with pytest.raises(ValueError, match="rank, greedy"):
        passkey(lm, scoring="luck")


def test_queries_ask_for_a_line_at_their_distance():
    queries = list(make_queries(60, (0, 3, 12), every=5, seed=1))
    assert queries == list(make_queries(60, (0, 3, 12), every=5, seed=1))
    assert {query.distance for query in queries} == {0, 3, 12}
    lines: list[tuple[str, ...]] = []
    for query in queries:
        lines += re.findall(r"Line (\d+): the drawer holds (\d+)", query.text)
        asked = re.search(r"line (\d+) hold", query.question)
        assert asked is not None
        line, number = lines[-1 - query.distance]
        assert line == asked[1] and query.candidates[query.answer] == f" {number}"
        assert len(set(query.candidates)) == 10


def test_lines_stream_past_the_cache_and_tell_accuracy_by_distance():
    found = line_retrieval(
        spelling_lm(), ji.streaming(4, 60), lines=12, distances=(0, 2), every=3, seed=0
    )
    assert [one.distance for one in found] == [0, 2]
    assert sum(one.queries for one in found) == 4
    assert found[0].tokens < found[1].tokens
    with pytest.raises(ValueError, match="no query"):
        line_retrieval(spelling_lm(), lines=12, distances=(40,))


def test_copies_repeat_and_pairs_come_back_at_their_distance():
    sequences, distances = make_recall("copy", 8, 2, range(30))
    assert (sequences[:, :8] == sequences[:, 8:]).all() and len(set(sequences[0])) == 8
    assert distances[:, :9].max() == 0 and (distances[:, 9:] == 8).all()
    sequences, distances = make_recall("associative", 6, 3, range(30), seed=2)
    for row, column in zip(*np.nonzero(distances), strict=True):
        back = column - distances[row, column]
        assert (sequences[row, [back - 1, back]] == sequences[row, [column - 1, column]]).all()
    assert (distances > 0).sum() == 3 * 6


def test_recall_judges_the_second_pass_only():
    lm = lm_of()
    (found,) = recall(lm, sizes=(10,), rows=2)
    tokens = [t for t in range(61) if t not in lm.config.eos_token_ids]
    sequences, _ = make_recall("copy", 10, 2, tokens)
    scores = lm.score(sequences.tolist())
    judged = np.array([score.log_probs[-9:] for score in scores])
    assert found.distance == 10 and found.count == 18
    np.testing.assert_allclose(found.nll, -judged.mean(), rtol=1e-4)
    pairs = recall(lm, ji.streaming(1, 7), kind="associative", sizes=(8,), rows=2)
    assert sum(one.count for one in pairs) == 16


def test_rouge_has_its_known_values():
    found = rouge(["the cat sat", "a b c d"], ["the cat stood", "a c b d"])
    assert found["rouge1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["rouge2"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["rougeL"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    with pytest.raises(ValueError, match="as many"):
        rouge(["a"], [])


def test_the_full_cache_continues_as_itself():
    texts = ["the quick brown fox jumps over the lazy dog " * 3]
    options = {"prompt_tokens": 24, "new_tokens": 12}
    found = continuation_rouge(spelling_lm(), texts, "full", **options)
    assert found["rougeL"] == 1.0
    other = continuation_rouge(spelling_lm(), texts, "full", reference="text", **options)
    assert other["rougeL"] < 1
    with pytest.raises(ValueError, match="24 \\+ 999"):
        continuation_rouge(spelling_lm(), texts, prompt_tokens=24, new_tokens=999)
