"""Ctrl-C: never inside jax, never dropped, never kept waiting without a word."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The module alone: it needs nothing else, and jax takes seconds to import.
START = """
import os, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
module = types.ModuleType("interrupts")
exec(open(sys.argv[1]).read(), module.__dict__)
finishing, handled = module.finishing, module.handled
jax = types.ModuleType("jax.compiler")
exec("def call(function):\\n    function()\\n    print('returned')", jax.__dict__)
def press():
    os.kill(os.getpid(), signal.SIGINT)
"""
COMPILING = """
    import hashlib
    def compile():
        print("begun", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # C code that never looks at signals
    jax.call(compile)
"""
MODULE = Path(__file__).parents[2] / "jaxinfer" / "cli" / "interrupts.py"


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", START + code, MODULE], capture_output=True, text=True, timeout=120
    )


def begun(code: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", START + code, MODULE],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def test_a_press_inside_jax_is_raised_when_jax_has_returned():
    done = run("""
def model():  # our own code, with jax below it
    press()
    print("pressed")
with handled():
    try:
        jax.call(model)
        while True:
            pass
    except KeyboardInterrupt:
        print("raised")
""")
    assert done.stdout.split() == ["pressed", "returned", "raised"] and done.stderr == ""


@pytest.mark.parametrize("place", ["finalizer", "collector"])
def test_a_press_that_python_drops_is_raised_again(place):
    done = run(f"""
import gc
class Last:
    def __del__(self):
        press()
def collected(phase, info):
    if phase == "start" and {place == "collector"}:
        gc.callbacks.clear()
        press()
with handled():
    try:
        gc.callbacks.append(collected)
        gc.collect()
        if {place == "finalizer"}:
            Last()
        while True:
            pass
    except KeyboardInterrupt:
        print("raised")
""")
    assert done.stdout == "raised\n" and done.stderr == ""


def test_a_compilation_ends_with_the_process_where_nothing_can_be_lost():
    process = begun("with handled():" + COMPILING)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130 and message == ""


def test_where_something_can_be_lost_the_first_press_says_so_and_the_second_ends_it():
    process = begun("with handled(), finishing():" + COMPILING)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("interrupted; this step is finished first")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130


def test_a_press_that_was_answered_does_not_count_for_the_next():
    done = run("""
import time
with handled(), finishing():
    for _ in range(3):
        try:
            press()
            while True:
                pass
        except KeyboardInterrupt:
            print("raised", flush=True)
    time.sleep(0.5)  # longer than a press may go unanswered
""")
    assert done.returncode == 0 and done.stdout.split() == ["raised"] * 3 and done.stderr == ""


def test_a_process_in_the_background_goes_on_ignoring_it():
    done = run("""
signal.signal(signal.SIGINT, signal.SIG_IGN)
with handled():
    press()
print("went on")
""")
    assert done.stdout == "went on\n" and done.returncode == 0


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_a_cold_compilation_ends_with_130(tmp_path):
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from jaxinfer.cli import main
print("begun", flush=True)
sys.exit(main())
"""
    command = [sys.executable, "-c", code, "generate", "--raw", "Once", "-m", "tiny-llama"]

    def start(folder: str) -> subprocess.Popen:
        kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        process = subprocess.Popen(
            [*command, "-n", "24"], env=kept | {"JAXINFER_CACHE": str(tmp_path / folder)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        return process

    process, since = start("whole"), time.perf_counter()
    process.communicate()
    whole, moments = time.perf_counter() - since, random.Random(0)
    ends = []
    for trial in range(20):
        process = start(f"trial-{trial}")
        time.sleep(moments.uniform(0, 0.8 * whole))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            ends.append((process.communicate(timeout=120)[1], process.returncode))
    assert len(ends) > 10 and set(ends) == {("", 130)}
