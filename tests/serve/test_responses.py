"""`/v1/responses`, as the `openai` package sees it."""

import json

import openai
import pytest

from jaxinfer.serve import ServeConfig
from tests.serve.serving import serving

NAME = "tiny-llama"
ASKED = {"model": NAME, "input": "Once upon a time", "max_output_tokens": 8, "temperature": 0}
READ = "user: Once upon a time\nassistant:"
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def expected(batcher):
    return batcher.submit(READ, max_new_tokens=8, top_logprobs=2).result()


def test_a_response_is_the_answer_to_its_input(client, expected):
    found = client.responses.create(**ASKED, metadata={"a": "b"})
    assert found.output_text == expected.text
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.input_tokens == expected.stats.prompt_tokens
    assert found.usage.total_tokens == found.usage.input_tokens + 8
    assert found.metadata == {"a": "b"} and found.model == NAME
    assert client.responses.retrieve(found.id) == found


def test_an_answer_that_ends_is_completed(client):
    found = client.responses.create(**ASKED, extra_body={"choice": ["yes"]})
    assert (found.status, found.output_text) == ("completed", "yes")
    assert found.completed_at >= found.created_at and found.output[0].status == "completed"


def test_a_stream_tells_of_everything_in_order(client, expected):
    include = ["message.output_text.logprobs"]
    with client.responses.stream(**ASKED, include=include, top_logprobs=2) as stream:
        events = list(stream)
    final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == expected.text == final.output_text
    scores = final.output[0].content[0].logprobs
    assert [one.logprob for one in scores] == pytest.approx(expected.log_probs, abs=1e-6)
    assert client.responses.retrieve(final.id).output_text == expected.text


def test_a_conversation_goes_on_from_a_kept_answer(client, lm):
    first = client.responses.create(**ASKED, instructions="Be brief.")
    second = client.responses.create(
        model=NAME, input="Go on.", max_output_tokens=4, previous_response_id=first.id
    )
    # Instructions are those of one request.
    text = f"{READ} {first.output_text}\nuser: Go on.\nassistant:"
    assert second.usage.input_tokens == len(lm.encode(text))
    assert second.previous_response_id == first.id
    by_hand = client.responses.create(
        model=NAME, max_output_tokens=4,
        input=[
            {"role": "user", "content": "Once upon a time"},
            *(item.model_dump(exclude_none=True) for item in first.output),
            {"role": "user", "content": [{"type": "input_text", "text": "Go on."}]},
        ],
    )  # fmt: skip
    assert by_hand.usage.input_tokens == second.usage.input_tokens


def test_tools_are_called_and_their_answers_read(client):
    forced = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}}
    asked = ASKED | {"max_output_tokens": 100, **forced}
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        found = stream.get_final_response()
    (call,) = found.output
    assert (call.type, call.name, found.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Bern", "Rome")
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1 and "".join(deltas) == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    answer = client.responses.create(
        model=NAME, input=[output], previous_response_id=found.id, max_output_tokens=2,
        tools=[TOOL], tool_choice="none",
    )  # fmt: skip
    assert answer.output_text


def test_the_text_may_have_a_form(client):
    schema = {"type": "integer", "minimum": 10, "maximum": 99}
    form = {"format": {"type": "json_schema", "name": "number", "schema": schema}}
    found = client.responses.create(**ASKED, text=form)
    assert 10 <= json.loads(found.output_text) <= 99
    assert found.text.format.name == "number"


def test_an_answer_in_the_background_may_be_asked_for_and_ended(server, client, batcher):
    with batcher._device:
        begun = client.responses.create(**ASKED, background=True)
        assert begun.status == "in_progress" and begun.background
        other = client.responses.create(**ASKED, background=True)
        assert client.responses.cancel(other.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="the previous response is in_progress"):
            client.responses.create(**ASKED, previous_response_id=begun.id)
    server.settled()
    assert client.responses.retrieve(begun.id).status == "incomplete"
    assert client.responses.retrieve(other.id).status == "cancelled"
    client.responses.delete(begun.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.id)


def test_answers_are_kept_for_their_owner_and_the_oldest_go(batcher):
    config = ServeConfig(warmup=False, api_keys=("one", "other"), stored=2)
    with serving(batcher, config) as server:
        mine, theirs = server.client("one"), server.client("other")
        first = mine.responses.create(**ASKED)
        with pytest.raises(openai.NotFoundError):
            theirs.responses.retrieve(first.id)
        unkept = mine.responses.create(**ASKED, store=False)
        with pytest.raises(openai.NotFoundError):
            mine.responses.retrieve(unkept.id)
        for _ in range(2):
            theirs.responses.create(**ASKED)
        with pytest.raises(openai.NotFoundError, match="older ones go"):
            mine.responses.retrieve(first.id)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"reasoning": {"effort": "low"}}, "reasoning is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"conversation": "c"}, "conversation is not supported"),
        ({"background": True, "stream": True}, "cannot be combined with stream"),
        ({"top_logprobs": 2}, "top_logprobs need include"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"),
        ({"input": []}, "input: list should have at least 1"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"max_tokens": 3}, "max_tokens: this request has no such field"),
        ({"max_output_tokens": 500}, "exceeds the context"),
    ],
)
def test_wrong_fields_are_named(client, fields, says):
    with pytest.raises(openai.BadRequestError, match=says):
        client.responses.create(**ASKED, extra_body=fields)


def test_a_response_that_is_not_there_is_said_so(client):
    with pytest.raises(openai.NotFoundError, match="there is no response 'resp_x'"):
        client.responses.create(**ASKED, previous_response_id="resp_x")
    with pytest.raises(openai.BadRequestError, match="starting_after is not supported"):
        client.responses.retrieve("resp_x", extra_query={"starting_after": 1})
