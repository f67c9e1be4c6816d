"""Chat templates render like Hugging Face's and cannot harm the process that renders them."""

import dataclasses
import enum
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.io.chat_template import render_chat

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>\n{{x}}"}]
CHATML = """{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def test_messages_are_rendered_without_escaping():
    text = render_chat(CHATML, CHAT)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>\n{{x}}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_blocks_are_trimmed_like_hugging_face_does():
    template = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}"
    )
    assert render_chat(template, CHAT) == "system\nuser\n"


SAME = {
    "chatml": CHATML,
    "tokens, JSON, generation": "{{ bos_token }}{{ messages | tojson(indent=2) }}"
    "{% generation %}x{% set y = 1 %}{% endgeneration %}{{ y }}",
    "filters": "{{ messages[1].content | indent(4) | center(40) | wordwrap(7) | upper }}"
    "{{ messages | map(attribute='role') | list }}{{ messages | batch(3, 0) | list }}",
    "namespaces": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}"
    "{% endfor %}{{ n.i }}{{ dict(a=1) }}{{ range(3) | join('-') }}",
    "formats": "{{ '%05.1f' % 3.14159 }}{{ '{:>{}}'.format(1, 9) }}{{ 'x'.ljust(4) ~ 7 }}",
    "lines": "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n"
    "{% endfor %}",
    "escapes": "{{ 'a\\n\\u00e9' }}{{ '<b>' | e }}{{ messages[1].content | tojson }}",
}


@pytest.mark.parametrize("case", SAME)
def test_rendering_equals_transformers(case):
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    compiled = transformers._compile_jinja_template(SAME[case])
    expected = compiled.render(messages=CHAT, add_generation_prompt=True, bos_token="<s>")
    assert render_chat(SAME[case], CHAT, variables={"bos_token": "<s>"}) == expected


def test_a_template_can_refuse_a_conversation():
    with pytest.raises(ValueError, match="Unknown role: robot") as caught:
        render_chat(CHATML, [{"role": "robot", "content": "\n"}])
    assert "\n" not in str(caught.value)


def test_the_date_is_available():
    assert render_chat("{{ strftime_now('%Y') }}", CHAT) == time.strftime("%Y")


def test_loops_can_be_left():
    assert (
        render_chat("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", CHAT) == "system"
    )


BROKEN = {
    "underscore attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "functions of the loader": "{{ raise_exception.__globals__['json'] }}",
    "changing the messages": "{{ messages.append(1) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a file": "{% include '/etc/passwd' %}",
    "bad syntax": "{% for %}",
    "an unknown filter": "{{ messages | mystery }}",
    "a missing name": "{{ nothing.at.all }}",
    "names that Python gives a meaning": "{{ namespace(__class__=1) }}",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_template_gives_one_line(case):
    with pytest.raises(ValueError, match="the chat template failed") as caught:
        render_chat(BROKEN[case], CHAT)
    assert str(caught.value).isprintable()


def test_the_limits_start_anew_with_each_rendering():
    template = "{% for i in range(100000) %}{% endfor %}ok"
    assert [render_chat(template, CHAT) for _ in range(4)] == ["ok"] * 4


def test_control_characters_do_not_reach_a_terminal():
    with pytest.raises(ValueError, match=r"\\x1b\]0;pwned\\x07") as caught:
        render_chat("{{ raise_exception('\x1b]0;pwned\x07') }}", CHAT)
    assert str(caught.value).isprintable()


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


def test_messages_without_a_content_reach_the_template():
    chat = [*CHAT, CALL, {"role": "tool", "name": "f", "content": "4"}]
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}"
        "{{ m.tool_calls | tojson }}{% elif m.content is defined %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    assert 'assistant:[{"function": {"name": "f", "arguments": {"x": 1}}}]' in (
        render_chat(template, chat)
    )
    nothing = {**CALL, "content": None}  # as clients of OpenAI's API write it
    assert render_chat("{{ messages[0].content is defined }}", [nothing]) == "False"


def test_tools_documents_and_further_variables_reach_the_template():
    template = "{{ tools[0].function.name }} {{ documents[0].title }} {{ style.tone }}"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    text = render_chat(
        template,
        CHAT,
        tools=[tool],
        documents=[{"title": "t", "text": ""}],
        variables={"style": {"tone": "dry"}},
    )
    assert text == "f t dry"
    assert render_chat("{{ tools is none and documents is none }}", CHAT) == "True"


class Role(enum.Enum):
    USER = "user"


@dataclasses.dataclass
class Part:
    type: str = "text"
    text: str = "x"


def test_values_of_python_become_those_of_json():
    given = {"i": np.int64(2), "b": np.bool_(False), "f": np.float32(0.5), "t": (1, Part())}
    text = render_chat("{{ messages[0] | tojson }}", [{"role": "user", "content": "x", **given}])
    assert json.loads(text) == {
        "role": "user",
        "content": "x",
        "i": 2,
        "b": False,
        "f": 0.5,
        "t": [1, {"type": "text", "text": "x"}],
    }


ITSELF: list = []
ITSELF.append(ITSELF)
DOUBLED: list = []
for _ in range(60):
    DOUBLED = [DOUBLED, DOUBLED]
VALUES = {
    "bytes": b"x" * 10**7,
    "an array": np.zeros(3),
    "an enum": Role.USER,
    "an object": object(),
    "a list that holds itself": ITSELF,
    "a list of lists": DOUBLED,
    "many values": [0] * 10**6,
    "names that are numbers": {1: 2},
    "a large integer": 10**5000,
}


@pytest.mark.parametrize("case", VALUES)
def test_what_is_no_json_is_refused(case):
    chat = [{"role": "user", "content": "x", "more": VALUES[case]}]
    with pytest.raises(ValueError, match="message 0: ") as caught:
        render_chat("x", chat)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_messages_larger_than_any_context_are_refused():
    with pytest.raises(ValueError, match="have 17000[0-9]{3} bytes; at most 16777216"):
        render_chat("x", [{"role": "user", "content": "x" * 17_000_000}])


@pytest.mark.parametrize(
    "messages",
    [
        [], "hi", {"role": "user"}, [1], [{"role": "user"}], [{"content": "x"}], None, ITSELF,
        [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}],
        [{"role": "system", "content": None}], [{"role": "user", "content": 5, "x": DOUBLED}],
    ],
)  # fmt: skip
def test_messages_of_a_wrong_form_are_refused(messages):
    with pytest.raises(ValueError, match="messages? .*must be a"):
        render_chat(CHATML, messages)


@pytest.mark.parametrize("name", ["tools", "documents"])
@pytest.mark.parametrize("value", ["x", {"a": 1}, 5, [1], [print]])
def test_tools_and_documents_of_a_wrong_form_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a list of"):
        render_chat(CHATML, CHAT, **{name: value})


@pytest.mark.parametrize("template", [None, 7, b"x", ["x"]])
def test_a_template_that_is_no_text_is_refused(template):
    with pytest.raises(ValueError, match="a chat template must be a text"):
        render_chat(template, CHAT)


def test_a_variable_cannot_replace_the_messages():
    with pytest.raises(ValueError, match="variables must not hold 'messages'"):
        render_chat("x", CHAT, variables={"messages": []})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet="{}%| ()[]'\"ab0+*~.=-\n_#", max_size=40))
def test_any_text_is_rendered_or_refused_in_one_line(template):
    try:
        render_chat(template, CHAT)
    except ValueError as error:
        assert "\n" not in str(error)
