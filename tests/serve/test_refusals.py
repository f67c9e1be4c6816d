"""What is refused, with which exception of the `openai` package, and which field it names."""

import json

import httpx
import openai
import pytest

from jaxinfer.serve import ServeConfig
from tests.serve.serving import model, serving

NAME = "tiny-llama"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": NAME, "prompt": "hi", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("store", True, "store is not supported"),
        ("modalities", ["audio"], "modalities is not supported"),
        ("web_search_options", {}, "web_search_options is not supported"),
        ("functions", [{"name": "f"}], "functions is not supported"),
        ("best_of", 2, "best_of: this request has no such field"),
        ("temperature", 2.5, "temperature: input should be less than or equal to 2"),
        ("temperature", "1", "temperature: input should be a valid number"),
        ("temperature", True, "temperature: input should be a valid number"),
        ("n", 0, "n: input should be greater than or equal to 1"),
        ("n", 100, "wants 100 answers, and 10 run or wait"),
        ("max_tokens", 0, "max_tokens: input should be greater"),
        ("stop", [""], "stop.0: string should have at least 1"),
        ("logit_bias", {"a": 1}, "logit_bias.a: "),
        ("logit_bias", {"99999": 1}, "token 99999 is beyond the vocabulary of 4096"),
        ("top_logprobs", 2, "top_logprobs need logprobs"),
        ("stream_options", {"include_usage": True}, "stream_options need stream"),
        ("tool_choice", "required", "tool_choice needs tools"),
        ("messages", [], "messages: list should have at least 1 item"),
        ("messages", [{"role": "user"}], "messages.0.content: field required"),
        ("messages", [{"role": "wizard", "content": "x"}], "messages.0: input tag 'wizard'"),
        ("messages", [{"role": "assistant"}], "needs content or tool_calls"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.0.type: input should be 'text'",
        ),
        ("min_tokens", 3, "min_tokens: 3 exceeds the 2 tokens"),
        ("regex", "", "regex: string should have at least 1"),
    ],
)
def test_a_wrong_field_is_named(server, client, field, value, says):
    response = server.post("/v1/chat/completions", CHAT | {field: value})
    error = response.json()["error"]
    assert response.status_code == 400 and says in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"].split(".")[0] == field
    with pytest.raises(openai.BadRequestError, match=says.partition(":")[0]):
        client.chat.completions.create(**(CHAT | {"extra_body": {field: value}}))


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("suffix", "end", "suffix is not supported"),
        ("prompt", [5000], "token 5000 is outside the vocabulary of 4096"),
        ("prompt", [-1], "prompt.0: input should be greater than or equal to 0"),
        ("prompt", [1, "a"], "prompt.1: input should be a valid integer"),
        ("prompt", "", "the prompt is empty"),
        ("prompt", "word " * 600, "exceeds the context of 448"),
        ("max_tokens", 448, "exceeds the context of 448"),
        ("max_tokens", 0, "max_tokens: 0 needs echo"),
        ("best_of", 1, "best_of: 1 is below n = 2"),
        ("logprobs", 21, "logprobs: input should be less than or equal to 20"),
        ("messages", [], "messages: this request has no such field"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(server, field, value, says):
    response = server.post("/v1/completions", TEXT | {"n": 2, field: value})
    assert response.status_code == 400 and says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body, status, says",
    [
        (b"", 400, "not valid JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b'{"prompt": NaN}', 400, "NaN is beyond the numbers of JSON"),
        (b'{"temperature": 1e999}', 400, "1e999 is beyond"),
        (b'{"prompt": "\\ud800"}', 400, "surrogates not allowed"),
        (b'{"prompt": "\xff"}', 400, "not valid JSON"),
        (b"[" * 100_000, 400, "not valid JSON"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, 400, "more than 64 levels"),
        (b'{"n":' + b"9" * 5000 + b"}", 400, "not valid JSON"),
        (b'{"prompt": "' + b"a" * 2**20 + b'"}', 413, "the body exceeds 1048576 bytes"),
    ],
)
def test_a_body_that_is_no_small_json_object_is_refused(server, body, status, says):
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert (response.status_code, says in response.json()["error"]["message"]) == (status, True)

    def pieces():
        yield body

    piecewise = httpx.post(f"{server.url}/v1/completions", content=pieces(), headers=headers)
    assert piecewise.status_code == status


def test_a_body_that_a_web_page_may_send_unasked_is_refused(server):
    text = json.dumps(TEXT)
    response = httpx.post(
        f"{server.url}/v1/completions", content=text, headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 415
    assert "access-control-allow-origin" not in response.headers


def test_what_is_not_there_is_said_so(server, client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="x")
    assert server.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.get("/v1/completions").status_code == 405
    assert server.post("/health").status_code == 405


def test_a_large_body_is_the_clients_own_exception(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=NAME, prompt="a" * 2**20)
    assert caught.value.status_code == 413


def test_a_model_without_a_template_cannot_chat_and_one_without_tools_cannot_call():
    with (
        model("{{ messages[0].content }}").batcher(slots=1, context=64) as simple,
        model(None).batcher(slots=1, context=64) as plain,
        serving(simple) as one,
        serving(plain) as other,
    ):
        with pytest.raises(openai.UnprocessableEntityError, match="knows no tools"):
            one.client().chat.completions.create(**CHAT, tools=[TOOL])
        with pytest.raises(openai.UnprocessableEntityError, match="has no chat template"):
            other.client().chat.completions.create(**CHAT)


def test_keys_are_asked_for_and_compared(batcher):
    config = ServeConfig(warmup=False, api_keys=("first-key", "second-key"), name="mine")
    with serving(batcher, config) as server:
        for key in ("first-key", "second-key"):
            assert [model.id for model in server.client(key).models.list()] == ["mine"]
        with pytest.raises(openai.AuthenticationError, match="the API key is not valid") as caught:
            server.client("first-kez").completions.create(model="mine", prompt="x")
        assert caught.value.code == "invalid_api_key"
        response = server.post("/v1/completions", TEXT)
        assert response.status_code == 401 and "is missing" in response.text
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert server.get(path).status_code == 200
        assert "first-key" not in repr(server.context.config)


def test_texts_of_one_key_are_not_found_by_another(batcher):
    config = ServeConfig(warmup=False, api_keys=("one", "other"))
    text = "In the year of the great flood the people of the valley went"
    with serving(batcher, config) as server:
        found = [
            server.client(key).completions.create(model=NAME, prompt=text, max_tokens=1).usage
            for key in ("one", "other", "one")
        ]
    assert [usage.prompt_tokens_details.cached_tokens > 0 for usage in found] == [
        False, False, True,
    ]  # fmt: skip


def test_web_pages_of_named_origins_may_use_the_server(batcher):
    config = ServeConfig(warmup=False, cors_origins=("https://example.org",))
    with serving(batcher, config) as server:
        for origin, allowed in (("https://example.org", True), ("https://other.org", False)):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asked = httpx.options(f"{server.url}/v1/completions", headers=headers)
            assert ("access-control-allow-origin" in asked.headers) == allowed


@pytest.mark.parametrize(
    "field, value",
    [
        ("api_keys", "abc"),
        ("api_keys", ("",)),
        ("body_bytes", 0),
        ("timeout_s", 0),
        ("timeout_s", float("nan")),
        ("prefixes", "all"),
        ("log", "loud"),
        ("max_tokens", 0),
        ("name", 3),
        ("warmup", 1),
    ],
)
def test_a_wrong_configuration_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        ServeConfig(**{field: value})
