"""A server under load, with clients that go, and at its end."""

import contextlib
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from jaxinfer.decode.slot_batch import SlotBatch
from jaxinfer.serve import ServeConfig, create_app
from jaxinfer.serve.server import Server
from tests.serve.serving import serving

NAME = "tiny-llama"
TEXT = {"model": NAME, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


def ends(batcher) -> list[bool]:
    """Whether the newest tickets were cancelled."""
    return [ticket.cancelled for ticket in batcher._tickets]


def wait_for(holds) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_is_refused_at_once_and_what_was_admitted_ends(server, batcher):
    most = batcher.slots + batcher.queue
    with ThreadPoolExecutor(most) as pool:
        with batcher._device:  # nothing runs on
            asked = [pool.submit(server.post, "/v1/completions", TEXT) for _ in range(most)]
            wait_for(lambda: len(batcher._tickets) >= most)
            start = time.monotonic()
            with pytest.raises(openai.RateLimitError, match="try again later") as caught:
                server.client().completions.create(**TEXT)
            assert time.monotonic() - start < 5
            assert int(caught.value.response.headers["retry-after"]) >= 1
        texts = {one.result().json()["choices"][0]["text"] for one in asked}
    assert len(texts) == 1
    server.settled()
    assert 'jaxinfer_refusals_total{code="queue_full"}' in server.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slot(server, batcher, stream):
    server.settled()
    with batcher._device, pytest.raises(httpx.ReadTimeout):
        body = TEXT | {"stream": stream, "n": 2}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=0.3) as found:
            found.read()
    wait_for(lambda: all(ends(batcher)) and len(ends(batcher)) == 2)
    server.settled()


def test_a_slow_reader_stops_nobody(server, client, batcher):
    body = TEXT | {"stream": True, "max_tokens": 100}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as slow:
        lines = slow.iter_lines()
        next(lines)
        assert client.completions.create(**TEXT).usage.completion_tokens == 8
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_an_answer_that_takes_too_long_is_given_up(batcher):
    config = ServeConfig(warmup=False, timeout_s=0.3)
    with serving(batcher, config) as server, batcher._device:
        with pytest.raises(openai.InternalServerError, match="more than 0.3 seconds") as caught:
            server.client().completions.create(**TEXT)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="more than 0.3 seconds"):
            list(server.client().completions.create(**TEXT, stream=True))
        wait_for(lambda: ends(batcher)[-2:] == [True, True])


def test_a_body_that_never_comes_is_given_up(batcher):
    def slowly():
        yield b'{"prompt": '
        time.sleep(1)
        yield b'"x"}'

    with serving(batcher, ServeConfig(warmup=False, body_s=0.2)) as server:
        headers = {"Content-Type": "application/json"}
        found = httpx.post(f"{server.url}/v1/completions", content=slowly(), headers=headers)
    assert found.status_code == 408


def test_a_fault_in_a_step_fails_its_requests_and_not_the_server(server, client, monkeypatch):
    real, faults = SlotBatch.run, [RuntimeError("prompt text")]

    def run(self, steps, kind):
        if faults:
            raise faults.pop()
        return real(self, steps, kind)

    monkeypatch.setattr(SlotBatch, "run", run)
    with pytest.raises(openai.InternalServerError, match=r"the model failed \(RuntimeError\)"):
        client.completions.create(**TEXT)
    faults.append(RuntimeError("prompt text"))
    with pytest.raises(openai.APIError, match="the model failed"):
        list(client.completions.create(**TEXT, stream=True))
    assert client.completions.create(**TEXT).usage.completion_tokens == 8


def test_a_server_that_drains_refuses_and_lets_run(batcher):
    with serving(batcher, ServeConfig(warmup=False)) as server, ThreadPoolExecutor(1) as pool:
        with batcher._device:
            running = pool.submit(server.post, "/v1/completions", TEXT)
            wait_for(lambda: batcher.waiting)
            server.context.drain.draining = True
            with pytest.raises(openai.InternalServerError, match="about to end") as caught:
                server.client().completions.create(**TEXT)
            assert caught.value.status_code == 503
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert server.get("/ready").status_code == 503
            assert server.get("/health").status_code == 200
        assert running.result().status_code == 200


@contextlib.contextmanager
def signalled(lm, **config):
    """A server that may be sent signals, with a slot of its own and one request in flight."""
    with lm.batcher(slots=1, context=448, chunk=32) as own, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(create_app(own, ServeConfig(warmup=False, **config)))
        thread = threading.Thread(target=server.run, args=([listener],))
        with ThreadPoolExecutor(4) as pool, own._device:
            thread.start()
            wait_for(lambda: server.started)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"

            def ask(body=TEXT):
                return pool.submit(httpx.post, url, json=body, timeout=60)

            yield server, ask, thread
        thread.join(20)


@pytest.mark.parametrize("stream", [False, True])
def test_a_signal_lets_what_runs_end(lm, stream):
    with contextlib.ExitStack() as stack:
        server, ask, thread = stack.enter_context(signalled(lm))
        running = ask(TEXT | {"stream": stream})
        wait_for(lambda: server._context.batcher.waiting)
        server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: server._context.drain.draining)
        assert ask().result().status_code == 503
        stack.close()  # the device is free again
    assert running.result().status_code == 200 and "error" not in running.result().text
    assert not thread.is_alive() and server.aborted is None


def test_what_runs_too_long_behind_a_signal_is_given_up(lm):
    with contextlib.ExitStack() as stack:
        server, ask, thread = stack.enter_context(signalled(lm, drain_s=0.1))
        running = [ask(TEXT), ask(TEXT | {"stream": True})]
        wait_for(lambda: server._context.batcher.waiting == 2)
        server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: server._context.batcher._closing)
        stack.close()
    found = [one.result() for one in running]
    assert found[0].status_code == 503 and "the server ended" in found[1].text
    assert not thread.is_alive()


def test_a_server_is_ready_when_it_has_compiled(batcher, monkeypatch):
    compiles = threading.Event()
    monkeypatch.setattr(type(batcher), "warmup", lambda self: compiles.wait(20) and 0.0)
    with serving(batcher, ServeConfig()) as server:
        assert server.get("/ready").json()["error"]["code"] == "warming_up"
        compiles.set()
        wait_for(lambda: server.get("/ready").status_code == 200)


def test_logs_say_what_was_asked_without_texts_and_keys(batcher, capfd):
    config = ServeConfig(warmup=False, log="json", api_keys=("secret-key",))
    with serving(batcher, config) as server:
        server.client().completions.create(**TEXT | {"prompt": "very private"})
        server.get("/v1/models")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "{" in line]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v1/completions", 200),
        ("/v1/models", 401),
    ]
    assert not any(word in json.dumps(lines) for word in ("private", "secret"))
