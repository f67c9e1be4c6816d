"""`/v1/chat/completions` and the small endpoints, as the `openai` package sees them."""

import asyncio

import openai
import pytest

import jaxinfer as ji

NAME = "tiny-llama"
PARTS = [{"type": "text", "text": "Once upon "}, {"type": "text", "text": "a time"}]
TURNS = [
    {"role": "developer", "content": "Tell stories."},
    {"role": "user", "content": PARTS},
    {"role": "assistant", "content": "there was"},
    {"role": "user", "content": "Go on."},
]
READ = (
    "system: Tell stories.\nuser: Once upon a time\nassistant: there was\nuser: Go on.\nassistant:"
)
ASKED = {"model": NAME, "messages": TURNS, "max_completion_tokens": 10, "temperature": 0}


@pytest.fixture(scope="module")
def expected(batcher):
    return batcher.submit(READ, max_new_tokens=10, top_logprobs=2).result()


def test_an_answer_is_the_continuation_of_the_rendered_conversation(client, lm, expected):
    found = client.chat.completions.create(**ASKED)
    choice = found.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, "length")
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    assert found.usage.prompt_tokens == len(lm.encode(READ))
    assert found.object == "chat.completion" and found.system_fingerprint


def test_an_answer_without_a_limit_goes_to_the_end_of_the_context(client, batcher):
    turns = [{"role": "user", "content": "word " * 190}]
    found = client.chat.completions.create(
        model=NAME, messages=turns, temperature=0, extra_body={"ignore_eos": True}
    )
    assert found.usage.total_tokens == batcher.context


def test_a_stream_has_a_role_the_pieces_a_reason_and_the_usage(client, expected):
    chunks = list(
        client.chat.completions.create(
            **ASKED, stream=True, stream_options={"include_usage": True}, logprobs=True,
            top_logprobs=2,
        )
    )  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 10
    scores = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    listed = [entry for one in scores for entry in one.content]
    assert [entry.logprob for entry in listed] == pytest.approx(expected.log_probs, abs=1e-6)


def test_log_probabilities_list_the_likeliest_tokens_with_their_bytes(client, expected):
    found = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2).choices[0]
    content = found.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == expected.text
    assert [entry.logprob for entry in content] == pytest.approx(expected.log_probs, abs=1e-6)
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob  # it was greedy


def test_the_asynchronous_client_gets_the_same(server, expected):
    async def both():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        async with client:
            whole = client.chat.completions.create(**ASKED)
            stream = await client.chat.completions.create(**ASKED, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            return (await whole).choices[0].message.content, text

    assert asyncio.run(both()) == (expected.text, expected.text)


def test_several_answers_have_their_own_samples(client, batcher):
    options = {"sampler": ji.Sampler(temperature=1.0), "max_new_tokens": 8, "seed": 4}
    texts = [batcher.submit(READ, sample=i, **options).result().text for i in range(3)]
    found = client.chat.completions.create(
        model=NAME, messages=TURNS, max_tokens=8, n=3, seed=4, user="somebody"
    )
    assert [choice.message.content for choice in found.choices] == texts
    assert found.usage.completion_tokens == 24


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "jaxinfer"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


def test_texts_and_conversations_are_tokenized_and_back(server, lm):
    found = server.post("/tokenize", {"prompt": "Once upon a time"}).json()
    tokens = lm.encode("Once upon a time")
    assert found == {"tokens": tokens, "count": len(tokens), "max_model_len": 448}
    turns = [{"role": "user", "content": "hi"}]
    found = server.post("/tokenize", {"messages": turns}).json()
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {
        "prompt": "user: hi\nassistant:"
    }


def test_the_server_says_that_it_lives_and_is_ready_and_counts(server, client):
    assert server.get("/health").json() == {"status": "alive"}
    assert server.get("/ready").json() == {"status": "ready"}
    client.chat.completions.create(**ASKED)
    text = server.get("/metrics").text
    assert 'jaxinfer_requests_total{endpoint="/v1/chat/completions",status="200"}' in text
    assert "jaxinfer_slots 2.0" in text and "jaxinfer_generated_tokens_total" in text
    document = server.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
