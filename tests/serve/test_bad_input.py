"""Bodies of every kind of wrong: client errors with OpenAI's error object, soon; nothing breaks."""

import json
import time

import httpx
import hypothesis.strategies as st
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from jaxinfer.serve.openapi import BODIES

JSON_TYPE = {"Content-Type": "application/json"}
TURNS = [{"role": "user", "content": "hi"}]
PATHS = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5, 6]},
}
FIELDS = {
    path: sorted({*kind.model_fields, *kind.REFUSED, "other"}) for path, (kind, _) in BODIES.items()
}


def nested(depth: int, inner: object = 1) -> object:
    for level in range(depth):
        inner = [inner] if level % 2 else {"items": inner}
    return inner


REGEXES = [
    "(a+)+$", "(x+x+)+y", "a{1,100000}{1,100000}", "(?=a)", "[" * 200, ".*" * 300, "(.*a){25}b",
    "(a|b|ab)*c{9999}", "\\p{L}{0,5000}", "(" * 300 + ")" * 300, "\x00", "^$", "[^\\s\\S]",
]  # fmt: skip
GRAMMARS = [
    "start: start start", "start: /(a|a)*b/", "%json {", "start: %json {}", "start: @other", "",
    "start: " + '"a" ' * 2000, "start: a*\na: b*\nb: a*", 'start: "a"{0,100000}', "start: <|x|>",
    "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"\nstart: r0',
]  # fmt: skip
SCHEMAS = [
    {}, {"type": "x"}, {"$ref": "#"}, {"$ref": "http://x.org/"}, {"pattern": "(a*)*" * 50},
    {"type": "array", "maxItems": 10**9}, {"enum": [*range(5000)]}, {"enum": []}, {"not": {}},
    {"anyOf": [{"$ref": "#"}] * 50}, {"allOf": [{"type": "string"}, {"type": "null"}]},
    {"type": "integer", "multipleOf": 1e-300}, {"minimum": 5, "maximum": 4, "type": "number"},
    nested(50, {"type": "x"}), {"properties": {str(i): {} for i in range(3000)}, "type": "object"},
    {"type": "object", "patternProperties": {"(": {}}}, {"type": "string", "minLength": 10**12},
    {"x-guidance": {"whitespace_pattern": "("}}, {"$defs": 3, "$ref": "#/$defs/a"}, {"type": 3},
]  # fmt: skip
FORMS = [
    {"type": "json_schema", "json_schema": {"name": "x", "schema": one}} for one in SCHEMAS
] + [{"type": "json_object"}, {"type": "text"}, {"type": "xml"}]
SAID = ["<|endoftext|>", "\u202e", "\x00", "<tool_call>{", "", "word " * 400, "{{ 1/0 }}"]
MESSAGES = [
    *([{"role": role, "content": text}] for text in SAID for role in ("user", "wizard", "tool")),
    [{"role": "assistant", "content": None}], [{"role": "user", "content": []}],
    [{"role": "tool", "content": "x", "tool_call_id": ""}], TURNS * 40, [[]], [None],
    [{"role": "assistant", "tool_calls": [
        {"id": "a", "function": {"name": "look", "arguments": text}}
    ]} for text in ("{", "[]", "{}", "[" * 5000)],
]  # fmt: skip
LIKELY = {
    "regex": REGEXES, "grammar": GRAMMARS, "response_format": FORMS, "messages": MESSAGES,
    "choice": [["a", "a"], [""], ["x" * 5000], ['"', "\\", "\n"], ["\x00"]],
    "text": [{"format": one["json_schema"] | {"type": "json_schema"}} for one in FORMS[:-3]],
    "prompt": [*SAID, [5000], [-1], [[]], [], [2**40], ["a"] * 11, [[1, 2], "a"], [1.0], [True]],
    "input": [*SAID, *MESSAGES, [{"type": "function_call_output", "call_id": "x", "output": ""}]],
    "tokens": [[5000], [4095], [0] * 50, [-1], [], [2**31]],
    "tools": [
        [{"type": "function", "function": {"name": "look", "parameters": one, "strict": True}}]
        for one in SCHEMAS
    ] + [[{"type": "function", "name": "look", "parameters": one}] for one in SCHEMAS],
    "tool_choice": ["required", "auto", {"type": "function", "function": {"name": "look"}},
                    {"type": "function", "name": "look"}],
    "logit_bias": [{"5": 101}, {"5": -100}, {"x": 1}, {"5000": 1}, {"99999999999": 1}],
    "stop": ["<|endoftext|>", [""], ["a"] * 20, "x" * 2000, "\x00", [["a"]]],
    "seed": [2**63, -(2**63), 2**70, 1.5], "n": [0, 10, 11, 128, -1], "best_of": [1, 3],
    "temperature": [0, 2, 2.1, -0.0, 1e-300, 1e-45], "top_p": [0, 1e-300, 1], "min_p": [1, 1.1],
    "repetition_penalty": [0, 1e-300, 100, 101], "top_k": [-2, -1, 2**31 - 1, 2**31],
    "stream": [True], "echo": [True], "logprobs": [0, 20, 21, True], "top_logprobs": [20, 21],
    "include": [["message.output_text.logprobs"]], "stream_options": [{"include_usage": True}],
    "chat_template_kwargs": [{"messages": 1}, {"a": nested(60)}, {"tools": []}],
    "max_tokens": [0, 3, 448, 10**9], "min_tokens": [1, 2, 3], "ignore_eos": [True],
}  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-3, 5000),
    st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=10), st.just(10**400),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@st.composite
def bodies(draw) -> tuple[str, bytes]:
    """A path, and a body that is nearly right, with odd values or damaged bytes."""
    path = draw(st.sampled_from(sorted(PATHS)))
    body = dict(PATHS[path])
    for name in draw(st.lists(st.sampled_from(FIELDS[path]), max_size=3)):
        likely = st.sampled_from(LIKELY.get(name, [None]))
        body[name] = draw(st.one_of(likely, likely, likely, VALUES))
    data = bytearray(json.dumps(body).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(data)))
        put = draw(st.sampled_from([b"", b'"', b"{", b"\\ud800", b"NaN", b"\xff", b",", b"1e999"]))
        data[at : at + draw(st.integers(0, 3))] = put
    return path, bytes(data)


def check(server, path: str, data: bytes) -> None:
    start = time.monotonic()
    found = httpx.post(server.url + path, content=data, headers=JSON_TYPE, timeout=90)
    assert time.monotonic() - start < 60  # it may compile, on a busy machine
    assert found.status_code < 500, found.text
    if found.status_code != 200:
        error = found.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert "\n" not in error["message"] and len(error["message"]) <= 1000


def check_health(server) -> None:
    server.settled()
    assert server.get("/health").status_code == 200
    assert server.post("/v1/completions", {"prompt": "hi", "max_tokens": 2}).status_code == 200


@given(body=bodies())
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_breaks_the_server(server, body):
    check(server, *body)


@pytest.mark.parametrize("path", PATHS)
def test_no_odd_value_of_a_field_breaks_the_server(server, path):
    for field in set(FIELDS[path]) & set(LIKELY):
        extra = {"tool_choice": "required"} if field == "tools" else {}
        for value in LIKELY[field]:
            body = PATHS[path] | extra | {field: value}
            if field in ("regex", "grammar", "response_format", "text", "choice", "tools"):
                body |= {"max_tokens" if "max_tokens" in body else "max_output_tokens": 20}
            check(server, path, json.dumps(body).encode())
    check_health(server)


@pytest.mark.slow
def test_thousands_of_bodies_do_not_break_the_server(server):
    server.batcher.warmup()
    given(body=bodies())(
        settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))(
            lambda body: check(server, *body)
        )
    )()
    check_health(server)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "data",
    [
        b"{" * 10_000,
        b"[" * 10_000 + b"]" * 10_000,
        b'{"prompt": "' + b"a" * (2 * 2**20) + b'"}',
        b'{"a": ' * 10_000 + b"1" + b"}" * 10_000,
        b"\x00" * 100,
        b'"\\ud800"',
        b'{"prompt": "hi", "prompt": 3, "\\udfff": 1}',
        json.dumps({"messages": [{"role": "user", "content": "x"}] * 20_000}).encode(),
        json.dumps({"stop": ["x"] * 10_000}).encode(),
        json.dumps({"logit_bias": {str(i): 1 for i in range(10_000)}}).encode(),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_large_deep_and_broken_bodies_are_refused(server, path, data):
    check(server, path, data)


def test_the_server_is_well_behind_all_that(server):
    check_health(server)


def test_requests_made_from_the_openapi_document_get_what_it_says(server):
    document = server.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == "/metrics" or "responses/" in operation.path:
            continue

        @given(case=operation.as_strategy())
        @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
        def conforms(case):
            if isinstance(case.body, dict):
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
                    if isinstance(case.body.get(name), int):
                        case.body[name] = min(case.body[name], 3)
            case.call_and_validate(
                base_url=server.url,
                timeout=60,
                checks=[not_a_server_error, response_schema_conformance],
            )

        conforms()
    check_health(server)
