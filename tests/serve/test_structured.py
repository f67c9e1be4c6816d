"""Answers that must have a form: JSON schemas, expressions, choices, grammars."""

import json
import re

import jsonschema
import openai
import pytest

NAME = "tiny-llama"
TURNS = [{"role": "user", "content": "Tell me about the town."}]
NUMBER = {"type": "integer", "minimum": -5, "maximum": 120}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": NUMBER},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = {
    "a person": PERSON,
    "a number with bounds": {"type": "number", "exclusiveMinimum": 0, "maximum": 9.5},
    "one of some": {"enum": ["red", "green", 3, None, True]},
    "a constant": {"const": {"a": [1, 2]}},
    "a pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "a list of people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    "a pair": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, NUMBER],
        "items": False,
        "minItems": 2,
    },
    "either": {"anyOf": [{"type": "null"}, NUMBER, {"type": "boolean"}]},
    "a reference": {
        "$defs": {"colour": {"enum": ["red", "blue"]}},
        "type": "object",
        "properties": {"one": {"$ref": "#/$defs/colour"}, "other": {"$ref": "#/$defs/colour"}},
        "required": ["one", "other"],
        "additionalProperties": False,
    },
    "a tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["left"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "nested": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": NUMBER}, "required": ["b"]}},
        "required": ["a"],
    },
    "a date": {"type": "string", "format": "date"},
    "a map": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 99},
        "maxProperties": 2,
    },
    "a short text": {"type": "string", "minLength": 2, "maxLength": 6},
    "a list of words": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 4},
    "a list of lists": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "maxItems": 2,
    },
    "an optional field": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "one of several objects": {
        "anyOf": [
            {
                "type": "object",
                "properties": {k: {"const": k}},
                "required": [k],
                "additionalProperties": False,
            }
            for k in ("cat", "dog")
        ]
    },
    "a multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "types of several": {"type": ["boolean", "null"]},
}


def asked(schema: dict, seed: int, **options) -> dict:
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    return {
        "model": NAME, "messages": TURNS, "max_tokens": 100, "seed": seed,
        "response_format": form, **options,
    }  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_answers_that_end_follow_their_schema(client, schema):
    found = client.chat.completions.create(**asked(schema, 0, n=3))
    ended = [one for one in found.choices if one.finish_reason == "stop"]
    for one in ended:
        jsonschema.validate(json.loads(one.message.content), schema)
    free = "string" in json.dumps(schema) or "additionalProperties" not in json.dumps(schema)
    assert ended or free or schema is SCHEMAS["a tree"]


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_many_answers_that_end_follow_their_schema(client, schema):
    for seed in range(10):
        found = client.chat.completions.create(**asked(schema, seed)).choices[0]
        if found.finish_reason == "stop":
            jsonschema.validate(json.loads(found.message.content), schema)


def test_most_answers_end(client):
    schemas = [schema for name, schema in SCHEMAS.items() if name not in ("a tree", "nested")]
    found = [client.chat.completions.create(**asked(schema, 1)).choices[0] for schema in schemas]
    assert sum(one.finish_reason == "stop" for one in found) >= len(found) - 2


def test_a_stream_is_structured_too(client):
    whole = client.chat.completions.create(**asked(PERSON, 2)).choices[0].message.content
    stream = client.chat.completions.create(**asked(PERSON, 2, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_any_json_object_is_one(client):
    for seed in range(3):
        found = client.chat.completions.create(
            model=NAME, messages=TURNS, max_tokens=60, seed=seed,
            response_format={"type": "json_object"},
        ).choices[0]  # fmt: skip
        assert found.message.content.startswith("{")
        assert found.finish_reason == "length" or isinstance(
            json.loads(found.message.content), dict
        )


def test_blanks_are_bounded(client):
    space = 220  # which the model would take for ever
    found = client.completions.create(
        model=NAME, prompt="x", max_tokens=60, temperature=0,
        logit_bias={str(space): 100, "199": 100},
        extra_body={"response_format": asked({"const": [1, 2, 3]}, 0)["response_format"]},
    ).choices[0]  # fmt: skip
    assert found.finish_reason == "stop" and json.loads(found.text) == [1, 2, 3]


@pytest.mark.parametrize(
    "field, value, pattern",
    [
        ("regex", r"[A-Z][a-z]{3}(-[0-9]{1,3}){2}", r"[A-Z][a-z]{3}(-[0-9]{1,3}){2}"),
        ("regex", r"(a+)+b", r"a+b"),
        ("choice", ["yes", "no", 'say "x"\n\\'], r'yes|no|say "x"\n\\'),
        ("grammar", 'start: "<" (WORD ","){1,3} ">"\nWORD: /[a-z]{1,4}/', r"<([a-z]{1,4},){1,3}>"),
    ],
)
def test_expressions_choices_and_grammars_are_followed(client, field, value, pattern):
    for endpoint in ("chat", "text"):
        options = {"model": NAME, "max_tokens": 80, "n": 2, "extra_body": {field: value}}
        if endpoint == "chat":
            found = client.chat.completions.create(messages=TURNS, **options)
            texts = [(c.message.content, c.finish_reason) for c in found.choices]
        else:
            found = client.completions.create(prompt="The answer is ", **options)
            texts = [(c.text, c.finish_reason) for c in found.choices]
        ended = [text for text, reason in texts if reason == "stop"]
        assert all(re.fullmatch(pattern, text) for text in ended)
        assert ended or value == r"(a+)+b"


def test_a_neighbour_without_a_form_keeps_its_tokens(client, batcher):
    expected = batcher.submit("Once upon a time", max_new_tokens=40).result().text
    stream = client.chat.completions.create(**asked(SCHEMAS["a list of people"], 3, stream=True))
    free = client.completions.create(
        model=NAME, prompt="Once upon a time", max_tokens=40, temperature=0
    )
    assert free.choices[0].text == expected
    stream.close()


WRONG = [
    {"type": "objekt"},
    {"$ref": "#/nowhere"},
    {"type": "string", "pattern": "(?=a)"},
    {"type": "integer", "multipleOf": "x"},
]


@pytest.mark.parametrize(
    "fields",
    [
        *({"response_format": asked(schema, 0)["response_format"]} for schema in WRONG),
        {"regex": "["},
        {"regex": "(?=a)b"},
        {"regex": r"[^\s\S]"},
        {"grammar": "begin: x"},
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(client, fields):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model=NAME, messages=TURNS, max_tokens=10, extra_body=fields)
    assert caught.value.param == next(iter(fields)) and caught.value.code == "invalid_grammar"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"regex": "a", "choice": ["b"]}, "choice"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"regex": "a", "min_tokens": 2}, "min_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"choice": []}, "choice"),
    ],
)
def test_forms_that_contradict_others_are_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=TURNS, max_tokens=10, extra_body=fields)
    assert caught.value.param == param
