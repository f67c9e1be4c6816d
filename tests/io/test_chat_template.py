"""Chat templates render like Hugging Face's and cannot harm the process that renders them."""

import time

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


def test_rendering_equals_transformers():
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    template = (
        CHATML
        + "{{ bos_token }}{{ messages | tojson(indent=2) }}{% generation %}x{% endgeneration %}"
    )
    compiled = transformers._compile_jinja_template(template)
    expected = compiled.render(messages=CHAT, add_generation_prompt=True, bos_token="<s>")
    assert render_chat(template, CHAT, variables={"bos_token": "<s>"}) == expected


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


HOSTILE = {
    "underscore attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "functions of the loader": "{{ raise_exception.__globals__['json'] }}",
    "changing the messages": "{{ messages.append(1) }}",
    "a power": "{{ 2 ** 100000000 }}",
    "repetition": "{{ 'x' * 10000000000 }}",
    "repetition from the left": "{{ 10000000000 * 'x' }}",
    "a long list": "{{ [1] * 10000000000 }}",
    "a long range": "{% for i in range(10000000000) %}x{% endfor %}",
    "nested ranges": "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}",
    "doubling by +": "{% set n = namespace(s='x') %}"
    "{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='x') %}"
    "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(s='x') %}"
    "{% for i in range(60) %}{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}",
    "doubling by the replace filter": "{% set n = namespace(s='x') %}"
    "{% for i in range(60) %}{% set n.s = n.s | replace('x', 'xx') %}{% endfor %}",
    "doubling by join": "{% set n = namespace(s='x') %}"
    "{% for i in range(60) %}{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "doubling by the join method": "{% set n = namespace(s='x') %}"
    "{% for i in range(60) %}{% set n.s = ''.join([n.s, n.s]) %}{% endfor %}",
    "padding by format": "{{ '{:10000000000}'.format(1) }}",
    "padding by a format argument": "{{ '{:{}}'.format(1, 10000000000) }}",
    "padding by % and an argument": "{{ '%*d' % (10000000000, 1) }}",
    "padding by %": "{{ '%10000000000d' % 1 }}",
    "padding by the format filter": "{{ '%10000000000d' | format(1) }}",
    "padding by ljust": "{{ 'x'.ljust(10000000000) }}",
    "padding by center": "{{ 'x' | center(10000000000) }}",
    "padding by indent": "{{ 'x\ny' | indent(10000000000) }}",
    "padding by tojson": "{{ messages | tojson(indent=10000000000) }}",
    "batches": "{{ messages | batch(10000000000, 'x') | list }}",
    "slices": "{{ messages | slice(10000000000) | list }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a file": "{% include '/etc/passwd' %}",
    "bad syntax": "{% for %}",
    "an unknown filter": "{{ messages | mystery }}",
    "a missing name": "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_broken_template_gives_one_line_quickly(case):
    start = time.monotonic()
    with pytest.raises(ValueError, match="the chat template failed") as caught:
        render_chat(HOSTILE[case], CHAT)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 2


def test_the_limits_start_anew_with_each_rendering():
    template = "{% for i in range(100000) %}{% endfor %}ok"
    assert [render_chat(template, CHAT) for _ in range(4)] == ["ok"] * 4


@pytest.mark.parametrize(
    "messages", [[], "hi", {"role": "user"}, [1], [{"role": "user"}], [{"content": "x"}], None]
)
def test_messages_of_a_wrong_form_are_refused(messages):
    with pytest.raises(ValueError, match="messages? .*must be a"):
        render_chat(CHATML, messages)


@settings(max_examples=150, deadline=2000, derandomize=True)
@given(st.text(alphabet="{}%| ()[]'\"ab0+*~.=-\n_#", max_size=40))
def test_any_text_is_rendered_or_refused_in_one_line(template):
    try:
        render_chat(template, CHAT)
    except ValueError as error:
        assert "\n" not in str(error)
