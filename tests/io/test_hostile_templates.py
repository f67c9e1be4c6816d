"""Templates that ask for all there is, or for what is not theirs: a text or one line, and an end.

The cases are expressions of every kind that jinja2 has; a few more are built here, as they are
long. A rendering may take 2 s of processor time; most of these are stopped earlier here.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxinfer.io import template_process
from jaxinfer.io.chat_template import render_chat

CHAT = [{"role": "user", "content": "hi"}]
CASES = json.loads(Path(__file__).with_name("hostile_templates.json").read_text())
LONG = {
    "parentheses": "{{" + "(" * 100_000 + "1" + ")" * 100_000 + "}}",
    "lists": "{{" + "[" * 5000 + "]" * 5000 + "}}",
    "negations": "{{" + "not " * 50_000 + "1}}",
    "signs": "{{" + "-" * 50_000 + "1}}",
    "sums": "{{" + "1+" * 50_000 + "1}}",
    "attributes": "{{a" + ".b" * 50_000 + "}}",
    "filters": "{{1" + "|string" * 50_000 + "}}",
    "conditions": "{% if 1 %}" * 5000 + "x" + "{% endif %}" * 5000,
    "loops": "{% for i in [1,2] %}" * 30 + "x" + "{% endfor %}" * 30,
    "calls": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "statements": "{{1}}" * 3_000_000,
    "text": "a" * 20_000_000,
    "an integer": "{{" + "9" * 2_000_000 + "}}",
    "a comment": "{#" + "x" * 1_000_000,
    "beginnings": "{{" * 100_000,
    "spaces": "{%" + " " * 200_000 + "x",
    "lines": "\n" * 500_000 + "{%-x",
    "NUL and a surrogate": "\0\ud800{{ strftime_now('\ud800') }}",
}


def text_or_line(template: str) -> str:
    try:
        return render_chat(template, CHAT)
    except ValueError as error:
        assert str(error).startswith("the chat template failed") and str(error).isprintable()
        assert len(str(error)) < 500
        return ""


@pytest.mark.parametrize("case", [*CASES, *LONG])
def test_a_text_or_one_line(case, monkeypatch):
    monkeypatch.setattr(template_process, "WALL_SECONDS", 0.4)
    text = text_or_line((CASES | LONG)[case])
    assert not any(leak in text for leak in ("uid=", "root:", "/lib/python", "subprocess"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *LONG])
def test_a_text_or_one_line_under_the_real_limits(case):
    text_or_line((CASES | LONG)[case])


def test_processor_time_ends():
    with pytest.raises(ValueError, match="it takes more than [23]"):
        render_chat(CASES["bomb macro recursion"], CHAT)
    assert render_chat("{{ 1 + 1 }}", CHAT) == "2"  # in a new process


def test_memory_ends():
    with pytest.raises(ValueError, match="it needs more than 224 MB of memory"):
        render_chat("{{ 'a' * 10**9 }}", CHAT)


def test_a_text_ends():
    with pytest.raises(ValueError, match="it writes a text of more than 4194304 characters"):
        render_chat("{{ 'a' * (4 * 1024 * 1024 + 1) }}", CHAT)
    assert len(render_chat("{{ 'a' * (4 * 1024 * 1024) }}", CHAT)) == 4 * 2**20


def test_a_separator_counts_in_the_text():
    with pytest.raises(ValueError, match="it writes a text of more than"):
        render_chat("{{ range(1000) | join('x' * 5000) }}", CHAT)


def test_a_template_may_open_no_file():
    # a codec that is not in memory lies in a file
    with pytest.raises(ValueError, match="a template may read none"):
        render_chat("{{ 'a'.encode('cp037') }}", CHAT)


def test_processes_are_kept_and_none_is_left_over():
    render_chat("x", CHAT)
    first = template_process._renderer._process
    render_chat("y", CHAT)
    assert template_process._renderer._process is first
    text_or_line("{{ 'a' * 10**9 }}")
    render_chat("x", CHAT)
    assert first._process.returncode is not None


def test_a_process_that_was_killed_is_replaced():
    render_chat("x", CHAT)
    process = template_process._renderer._process._process
    process.kill()
    process.wait()
    assert render_chat("{{ 1 + 1 }}", CHAT) == "2"


def test_threads_get_their_own_text():
    texts = {}

    def work(name: str) -> None:
        texts[name] = [render_chat("{{ messages[0].content }}", [{**CHAT[0], "content": name}])]

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert texts == {str(i): [str(i)] for i in range(8)}


def test_ctrl_c_while_a_template_is_rendered(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    render_chat("x", CHAT)
    monkeypatch.setattr(template_process.worker, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_chat("late", CHAT)
    monkeypatch.undo()
    assert render_chat("{{ 1 + 1 }}", CHAT) == "2"  # and not the text of before


HOSTILE_MODULE = "import pathlib\npathlib.Path('{0}.ran').touch()\nraise SystemExit\n"


@pytest.mark.parametrize("closed", ["", "<&- >&- 2>&-"])
def test_another_process_in_a_hostile_folder_without_streams(closed, tmp_path):
    """Modules of the current folder do not run, and closed standard streams do not matter."""
    for name in ("jinja2", "markupsafe", "resource", "datetime", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(HOSTILE_MODULE.format(name))
    script = (
        "import os, sys, jaxinfer.io.template_process as p\n"
        "text = p.render('{{ 1 + 1 }}', {})\n"
        "pid = os.fork()\n"
        "if not pid: os._exit(p.render('{{ 2 + 2 }}', {}) != '4')\n"
        "assert os.waitpid(pid, 0)[1] == 0 and p.render('{{ 3 + 3 }}', {}) == '6'\n"
        "open('out', 'w').write(text)\n"
    )
    command = f'"{sys.executable}" -P -c "$SCRIPT" {closed}'
    env = os.environ | {"SCRIPT": "import sys; sys.path.append('')\n" + script}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, timeout=120, check=True)
    assert (tmp_path / "out").read_text() == "2"
    assert not list(tmp_path.glob("*.ran"))


def test_no_interpreter_is_said(monkeypatch):
    template_process._renderer.end()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ValueError, match="sys.executable is empty"):
        render_chat("x", CHAT)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ValueError, match="/no/such/python does not start: No such file"):
        render_chat("x", CHAT)
