"""`jaxinfer serve`: bad input in one line, and a process that drains."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

import jaxinfer as ji
from jaxinfer.parallel.hexgen import Assumptions, Costs, ModelSizes, Plan, Stage, Workload
from tests.parallel.hexgen.clusters import cluster

OPTIONS = ("--slots", "1", "--context", "64", "--prefix-cache", "off")


def refused(run, *arguments) -> str:
    found = run("serve", *arguments)
    assert found.code == 2 and found.err.startswith("error: ") and found.err.count("\n") == 1
    return found.err


def test_a_port_in_use_is_refused_before_a_model_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}: Address already in use" in refused(
            run, "/no/such", "--port", port
        )


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--api-key-file", "/no/such"), "cannot read /no/such"),
        (("--slots", "3"), "slots must be a power of two, got 3"),
        (("--slots", "1024", "--context", "4000000"), "memory available"),
        (("--policy", "nothing"), "nothing"),
        (("--policy", "kivi4", "--prefix-cache", "shared"), "reads a prompt at once"),
        (("--prefix-cache", "all"), "prefixes must be one of 'key', 'shared', 'off'"),
        (("--timeout", "0"), "timeout_s must be a number"),
        (("--tree", "x.json"), "add --draft"),
        (("--host", "256.1.1.1"), "cannot serve at 256.1.1.1"),
    ],
)
def test_what_cannot_be_served_is_refused(run, model, arguments, says):
    if "memory available" in says:  # a policy that does not end, or the context would be cut
        arguments += ("--policy", "streaming", "--policy-args", "window=3999996")
    assert says in refused(run, model, "--port", "0", *arguments)


def test_a_model_without_a_tokenizer_is_refused(run, bare_model):
    assert "has no tokenizer" in refused(run, bare_model, "--port", "0", *OPTIONS)


@pytest.mark.parametrize("text", ["", "# a comment\n\n", "two words\n"])
def test_a_file_without_keys_is_refused(run, tmp_path, model, text):
    file = tmp_path / "keys"
    file.write_text(text)
    assert "key" in refused(run, model, "--api-key-file", str(file))


class Process:
    """The command as a process, when it serves."""

    def __init__(self, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxinfer", "serve", *arguments, "--port", "0", "--log-json"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving .*: (http://[0-9.:]+)/v1", line):
                self.url = found[1]
                break
        assert self.lines and "serving" in self.lines[-1], self.lines
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        self.reader.join()
        return code


def test_a_signal_lets_what_runs_end_and_refuses_the_rest(tmp_path, model):
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret\n")
    served = Process(model, *OPTIONS, "--api-key-file", str(keys), "--served-name", "mine")
    headers = {"Authorization": "Bearer secret"}
    body = {"model": "mine", "prompt": "private", "max_tokens": 50, "stream": True}
    body["regex"] = "[a-z ]{40,}"  # one step at a time
    url = f"{served.url}/v1/completions"
    while httpx.get(f"{served.url}/ready").status_code != 200:
        time.sleep(0.2)
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as running:
        lines = running.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        for _ in range(200):
            late = httpx.post(url, json=body, headers=headers, timeout=60)
            if late.status_code == 503:
                break
        assert late.status_code == 503
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert served.end() == 0
    text = "".join(served.lines)
    assert "secret" not in text and "private" not in text
    events = [json.loads(line) for line in served.lines if line.startswith("{")]
    assert any(event["event"] == "request" and event["status"] == 503 for event in events)


def test_a_second_signal_ends_at_once(model):
    served = Process(model, *OPTIONS)
    assert httpx.get(f"{served.url}/health").status_code == 200
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as half:
        half.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 10\r\n\r\n{"
        )
        assert httpx.get(f"{served.url}/health").status_code == 200
        served.process.send_signal(signal.SIGINT)
        while not any("draining" in line for line in served.lines):
            assert served.process.poll() is None
        served.process.send_signal(signal.SIGINT)
        assert served.end() == 128 + signal.SIGINT


def test_what_stages_do_not_have_is_refused(run, tmp_path):
    config = ji.load("tiny-llama").config
    sizes = ModelSizes.of(config)
    costs = Costs(cluster(("A5000", 2, "X")), sizes, Assumptions())
    load = Workload(requests_per_s=1.0, deadline_s=5.0, lengths=((32, 16, 1.0),))
    file = tmp_path / "two.json"
    Plan.of(costs, load, [(Stage(0, 1, 6),), (Stage(0, 1, 6),)]).save(file)
    one = tmp_path / "one.json"
    Plan.of(costs, load, [(Stage(0, 1, 6),)]).save(one)
    cases = {
        "has 2 replicas": ("tiny-llama", "--plan", str(file)),
        "the plan is for a model with": ("tiny-draft", "--plan", str(one)),
        "--draft is for one process": ("--plan", str(one), "--draft", "prompt-lookup"),
        "--weights is for one process": ("--plan", str(one), "--weights", "int8"),
        "no-such.json": ("--plan", str(tmp_path / "no-such.json")),
    }
    for expected, arguments in cases.items():
        assert expected in refused(run, *arguments, "--port", "0")
