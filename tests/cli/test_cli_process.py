"""The command as a process of its own: exit codes, pipes, Ctrl-C, what is imported."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from jaxinfer.cli import main

# Ctrl-C works as in a terminal, also where the tests run in the background, which ignores it.
CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from jaxinfer.cli import main
sys.exit(main())
"""
COMMAND = [sys.executable, "-c", CODE]
NEVER_ENDING = ("--logit-bias", "257=-inf")


def test_bad_input_prints_no_traceback():
    done = subprocess.run(
        [*COMMAND, "generate", "x", "--model", "/no/such"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet(model):
    process = subprocess.Popen(
        [*COMMAND, "generate", "--raw", "x", "--model", model, "-n", "40"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    message = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141 and message == b""


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("generate", "-m", "MODEL"),
        ("generate", "-m", "MODEL", "--raw", "x", "-n", "2"),
        ("generate", "-m", "MODEL", "--raw", "x", "-n", "2", "--json"),
        ("generate", "-m", "/no/such", "x"),
        ("chat", "-m", "MODEL"),
        ("score", "-m", "MODEL", "a text"),
        ("score", "-m", "MODEL"),
        ("convert", "MODEL", "OUT"),
        ("info", "/no/such"),
        ("tree", "--target", "MODEL", "--sizes", "x"),
        ("eval", "perplexity", "/no/such"),
        ("train", "less", "/no/such", "--out", "OUT", "--run-dir", "OUT"),
        ("bench", "no-such"),
        ("env",),
    ],
    ids=" ".join,
)
def test_a_closed_stream_gives_a_line_or_silence(
    model, tmp_path, monkeypatch, capfd, piped, arguments, stream
):
    places = {"MODEL": model, "OUT": str(tmp_path / "out")}
    if stream != "stdin":
        piped("hello\n")
    capfd.readouterr()
    monkeypatch.setattr(sys, stream, None)  # as Python starts where it is closed
    assert main([places.get(argument, argument) for argument in arguments]) in (0, 2)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_of_a_process(closed):
    command = shlex.join([*COMMAND, "generate", "x", "--model", "/no/such"])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "" if "2>" in closed else done.stderr.startswith("error: ")


def test_ctrl_c_ends_quietly_with_130(model):
    # More text than a pipe holds: whoever is slow here, the command is still at work.
    endless = ("-n", "200000", "--policy", "streaming", "--policy-args", "window=60")
    process = subprocess.Popen(
        [*COMMAND, "generate", "x", "--raw", "--model", model, *endless, *NEVER_ENDING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)  # it has begun to write
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130 and message == b""


def test_no_verb_is_imported_with_heavy_packages():
    code = (
        "import sys, jaxinfer.cli; "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'orbax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
