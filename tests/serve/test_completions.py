"""`/v1/completions`, as the `openai` package sees it: what `lm.generate` gives."""

import math

import pytest

import jaxinfer as ji

PROMPT = "Once upon a time"
NAME = "tiny-llama"


def test_a_greedy_completion_is_that_of_generate(client, lm):
    expected = lm.generate(PROMPT, max_new_tokens=12)[0]
    found = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0)
    choice, usage = found.choices[0], found.usage
    assert (choice.text, choice.finish_reason) == (expected.text, "length")
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(lm.encode(PROMPT)), 12)
    assert usage.total_tokens == usage.prompt_tokens + 12
    assert found.model == NAME and found.system_fingerprint.startswith("fp_")


def test_all_settings_of_sampling_reach_the_sampler(client, lm, batcher):
    settings = {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.4}
    ours = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    sampler = ji.Sampler(**settings, **ours, logit_bias={300: 2.0})
    options = {"sampler": sampler, "max_new_tokens": 12, "seed": 7}
    expected = [batcher.submit(PROMPT, sample=i, **options).result().text for i in range(2)]
    found = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=12, seed=7, n=2, logit_bias={"300": 2}, **settings,
        extra_body=ours,
    )  # fmt: skip
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage.prompt_tokens == len(lm.encode(PROMPT))


def test_stops_end_the_text_before_them(client, batcher):
    text = batcher.submit(PROMPT, max_new_tokens=12).result().text
    stop = text[5:8]
    found = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, stop=[stop, "zzzz"]
    )
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text.split(stop)[0], "stop")


def test_prompts_may_be_texts_tokens_or_several_of_them(client, lm, batcher):
    texts = [PROMPT, "Water is"]
    expected = [batcher.submit(text, max_new_tokens=6).result().text for text in texts]
    for prompt in (texts, [list(lm.encode(text)) for text in texts]):
        found = client.completions.create(model=NAME, prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in found.choices] == expected
    found = client.completions.create(
        model=NAME, prompt=list(lm.encode(PROMPT)), max_tokens=6, temperature=0
    )
    assert found.choices[0].text == expected[0]


def test_a_stream_joins_to_the_whole_and_ends_with_the_usage(client):
    asked = {
        "model": NAME,
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0.8,
        "seed": 3,
        "n": 2,
    }
    whole = client.completions.create(**asked, logprobs=2)
    chunks = list(
        client.completions.create(
            **asked, logprobs=2, stream=True, stream_options={"include_usage": True}
        )
    )
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 24
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
        for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [x for part in parts if part.logprobs for x in getattr(part.logprobs, field)]
            assert joined == getattr(choice.logprobs, field), field


def test_log_probabilities_are_those_of_the_batcher(client, batcher):
    expected = batcher.submit(PROMPT, max_new_tokens=6).result()
    found = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3
    ).choices[0]
    scores = found.logprobs
    assert "".join(scores.tokens) == found.text
    assert scores.token_logprobs == pytest.approx(expected.log_probs, abs=2e-4)
    columns = scores.tokens, scores.token_logprobs, scores.top_logprobs
    for token, value, listed in zip(*columns, strict=True):
        assert len(listed) == 3 and max(listed.values()) == listed[token] == value
    for at, token in zip(scores.text_offset, scores.tokens, strict=True):
        assert found.text[at:].startswith(token)


def test_echo_repeats_the_prompt_with_its_log_probabilities(client, lm, batcher):
    expected = lm.score(PROMPT)[0]
    whole = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    found = whole.choices[0]
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (0, len(lm.encode(PROMPT)))
    assert found.text == PROMPT and found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(list(expected.log_probs), abs=2e-4)
    more = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=4, echo=True, temperature=0
    ).choices[0]
    assert more.text == PROMPT + batcher.submit(PROMPT, max_new_tokens=4).result().text


def test_best_of_gives_the_likeliest_samples(client, batcher):
    sampler = ji.Sampler(temperature=1.0)
    options = {"sampler": sampler, "max_new_tokens": 6, "seed": 1}
    samples = [batcher.submit(PROMPT, sample=i, **options).result() for i in range(4)]
    best = max(samples, key=lambda one: sum(one.log_probs) / len(one.log_probs))
    found = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=6, seed=1, n=1, best_of=4
    )
    assert found.choices[0].text == best.text and found.usage.completion_tokens == 24


def test_a_prompt_that_begins_like_an_earlier_one_is_partly_cached(client):
    text = "The history of the town began long ago when the first people"
    for cached in (False, True):
        found = client.completions.create(model=NAME, prompt=text + " came", max_tokens=1)
        assert (found.usage.prompt_tokens_details.cached_tokens > 0) == cached


def test_min_tokens_and_ignore_eos_put_the_end_off(client, lm):
    eos = lm.config.eos_token_ids[0]
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    bias = {str(eos): 100}
    ended = client.completions.create(**asked, logit_bias=bias)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    later = client.completions.create(**asked, logit_bias=bias, extra_body={"min_tokens": 3})
    assert later.usage.completion_tokens == 4
    never = client.completions.create(**asked, logit_bias=bias, extra_body={"ignore_eos": True})
    assert never.choices[0].finish_reason == "length"


def test_without_a_seed_two_answers_differ_and_logits_of_zero_are_numbers(client):
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 16}
    assert len({client.completions.create(**asked).choices[0].text for _ in range(4)}) > 1
    found = client.completions.create(
        **asked, logprobs=20, logit_bias={str(i): -100 for i in range(300)}
    )
    values = [v for top in found.choices[0].logprobs.top_logprobs for v in top.values()]
    assert all(map(math.isfinite, values))
