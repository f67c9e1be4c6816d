"""`LM` as users call it: scoring through the cache, logits, prompts and chat."""

import inspect
import math
import subprocess
import sys
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.decode.options import Options
from jaxinfer.decode.scoring import Score
from jaxinfer.lm import LM
from jaxinfer.testing.quick import quick_jit
from tests.factories import (
    CONFIGS,
    MODELS,
    PieceTokenizer,
    lm_of,
    params_of,
    random_tokens,
    scripted_lm,
)
from tests.policies import MATRIX, with_random_feature_maps

TEXT = random_tokens(1, 60, seed=9)[0].tolist()


def plain_log_probs(lm: LM, tokens: list[int]) -> np.ndarray:
    log_probs = jax.nn.log_softmax(lm.logits([tokens])[0])
    return np.asarray(log_probs[np.arange(len(tokens) - 1), np.asarray(tokens[1:])])


@pytest.mark.parametrize("model", MODELS)
def test_a_score_through_the_cache_equals_the_plain_forward(model):
    lm = lm_of(model)
    found = lm.score([TEXT])[0]
    np.testing.assert_allclose(found.log_probs, plain_log_probs(lm, TEXT), atol=2e-4)
    assert found.tokens == TEXT and found.chunk == 64


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_of_any_size_score_alike(chunk):
    lm = lm_of("llama")
    found = lm.score(TEXT, chunk=chunk)[0]
    np.testing.assert_allclose(found.log_probs, plain_log_probs(lm, TEXT), atol=2e-4)
    assert found.chunk == min(chunk, 64)


def test_a_chunk_that_is_no_multiple_of_the_unembedding_piece_is_scored():
    lm, text = lm_of("llama"), random_tokens(1, 300, seed=2)[0].tolist()
    found = lm.score(text, chunk=200)[0]
    np.testing.assert_allclose(found.log_probs, plain_log_probs(lm, text), atol=2e-4)


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_every_policy_scores_and_names_its_chunk(case):
    policy = with_random_feature_maps(case.hard(), lm_of("llama").config)
    found = lm_of("llama").score(TEXT, policy=policy)[0]
    assert len(found.log_probs) == len(TEXT) - 1 and np.isfinite(found.log_probs).all()
    assert found.chunk == (64 if policy.chunk_invariant else 1) and found.cache_bytes > 0


def test_a_policy_that_reads_prompts_whole_is_scored_token_by_token():
    from jaxinfer.cache.presets import full

    found = lm_of("llama").score(TEXT, policy=replace(full(), prompt="whole"))[0]
    assert found.chunk == 1


def test_perplexity_is_the_exponential_of_the_mean_negative_log_probability():
    score = Score([1, 2, 3], [-1.0, -3.0], 0, 1)
    assert score.nll == 2.0 and score.perplexity == math.exp(2.0)


def test_texts_are_scored_one_by_one():
    lm = lm_of("llama")
    found = lm.score([TEXT, TEXT[:40]])
    np.testing.assert_allclose(found[1].log_probs, found[0].log_probs[:39], atol=2e-4)


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([[3]], {}, "scoring needs at least 2 tokens, got 1"),
        ([[3, 61]], {}, "token 61 is outside the vocabulary of 61"),
        ([[3, 4]], {"chunk": 0}, "chunk must be a whole number from 1"),
        ([[3, 4]], {"policy": "lru"}, "unknown cache policy 'lru'"),
    ],
)
def test_bad_scores_are_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        lm_of("llama").score(texts, **options)


def test_logits_are_float32_for_every_dtype():
    for dtype in ("float32", "bfloat16"):
        logits = lm_of("llama", dtype).logits([TEXT[:8]])
        assert logits.shape == (1, 8, 61) and logits.dtype == np.float32


def test_scripted_text_is_certain():
    lm = scripted_lm([b"a", b"b", b"c"])
    assert lm.score("abc")[0].perplexity < 1.5


def test_strings_are_encoded_with_bos_and_continuations_without():
    lm = scripted_lm([b"a", b"b", b"c"])
    assert lm.encode("ab") == [lm.tokenizer.bos_token_id, 0, 1]
    assert lm.encode("ab", continues=True) == [0, 1]
    assert lm.encode("", continues=True) == []


class Chatty(PieceTokenizer):
    """Has a template that writes BOS, and a special token that text can name."""

    chat_template = "a template"

    def encode(self, text, add_special=True):
        rest = text.removeprefix("<s>")
        return [self.bos_token_id] * (rest != text) + super().encode(rest, add_special)

    def apply_chat_template(self, messages, *_):
        return "<s>" + "".join(message["content"] for message in messages)

    def encode_chat(self, messages, *_):
        return self.encode(self.apply_chat_template(messages), add_special=False)


@pytest.fixture(scope="module")
def chatty() -> LM:
    lm = scripted_lm([b"a", b"b", b"c", b"d"])
    return LM(lm.config, lm.params, Chatty([b"a", b"b", b"c", b"d"]), name="chatty")


def test_a_chat_is_answered(chatty):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert chatty.chat_tokens(messages) == [chatty.tokenizer.bos_token_id, 0, 1]
    out = chatty.chat(messages, max_new_tokens=8)
    assert out.text == "cd" and out.finish_reason == "eos" and out.stats.prompt_tokens == 3
    assert chatty.chat(messages, max_new_tokens=8, stop="d").text == "c"
    with pytest.raises(ValueError, match="chat gives one answer, got samples=2"):
        chatty.chat(messages, samples=2)


def test_a_rendered_chat_gets_no_second_bos(chatty):
    messages = [{"role": "user", "content": "ab"}]
    assert chatty.encode(chatty.chat_prompt(messages)) == chatty.chat_tokens(messages)


def keywords(function) -> dict[str, object]:
    found = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in found if one.kind is one.KEYWORD_ONLY}


def test_whatever_generates_takes_the_same_keywords_with_the_same_defaults():
    options = {field.name: field.default for field in fields(Options) if field.name != "limit"}
    options["sparsity"] = None  # of which the model is made that has the options
    assert keywords(LM.generate) == keywords(LM.stream) == options
    turn = {name: default for name, default in options.items() if name != "prefix"}
    for function in (ji.Session.generate, ji.Session.stream):
        assert keywords(function) == turn
    template = keywords(LM.chat_prompt)
    assert keywords(LM.chat) == turn | template
    assert keywords(LM.chat_tokens) == template | {"after": ()}
    assert keywords(LM.warmup).items() <= turn.items()
    for name in ("generate", "stream", "chat"):
        ahead, plain = (keywords(getattr(owner, name)) for owner in (ji.Speculator, LM))
        assert ahead.items() <= plain.items()
        assert set(plain) - set(ahead) <= {"draft", "sparsity", "samples"}


def test_an_empty_prompt_needs_a_bos():
    with pytest.raises(ValueError, match="the prompt is empty and the model has no BOS token"):
        lm_of("llama").encode([])
    assert LM(replace(CONFIGS["llama"], bos_token_id=5), params_of("llama")).encode([]) == [5]


def test_a_model_without_a_chat_template_says_so():
    with pytest.raises(ValueError, match="model llama has no chat template"):
        lm_of("llama").chat_prompt([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="model scripted has no chat template"):
        scripted_lm([b"a"]).chat_prompt([{"role": "user", "content": "hi"}])


def test_a_forward_is_committed_with_or_without_an_order():
    lm, count = lm_of("llama"), jnp.asarray([5, 3], jnp.int32)
    cache = lm.engine.new_cache(ji.full(), 2, 64)
    forward, commit = quick_jit(ji.forward), quick_jit(ji.commit)
    out = forward(lm.config, lm.params, jnp.asarray(random_tokens(2, 5)), cache)
    assert isinstance(out, ji.Output)
    plain = commit(lm.config, lm.params, cache, out.fresh, None, count)
    ordered = commit(lm.config, lm.params, cache, out.fresh, None, count, out.hidden[:, :, 0])
    assert plain.length.tolist() == [5, 3]
    jax.tree.map(np.testing.assert_array_equal, plain.layers, ordered.layers)


def test_importing_the_library_imports_nothing_heavy():
    code = (
        "import sys, jaxinfer as ji; ji.convert, ji.Stats, ji.Stream; print([m for m in "
        "('flax', 'orbax', 'torch', 'transformers', 'matplotlib', 'jinja2', 'jaxinfer.theory', "
        "'jaxinfer.parallel') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
