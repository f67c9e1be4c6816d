"""Sessions survive Ctrl-C, exceptions and streams that nobody ended."""

from contextlib import contextmanager

import jax
import pytest

from jaxinfer.decode.run import Run
from jaxinfer.lm import LM
from jaxinfer.runtime.program import Program
from tests.factories import lm_of, random_tokens, scripted_lm

A, B = (random_tokens(1, n, seed=n)[0].tolist() for n in (9, 4))
NEW = {"max_new_tokens": 8}
PIECES = [bytes([c]) for c in b"abcdefghijklmnopqrstuvwxyz"]
TEXT = b"".join(PIECES).decode()


@pytest.fixture(scope="module")
def lm() -> LM:
    return lm_of()


@pytest.fixture(scope="module")
def letters() -> LM:
    return scripted_lm(PIECES)


def history(session) -> list[int]:
    return session.tokens + session.pending


def said(session) -> str:
    return session.lm.tokenizer.decode(history(session))


@contextmanager
def interrupted(lm: LM, program: str, call: int = 1):
    """Ctrl-C behind the `call`-th run of a program: what it was given is gone, what it made too."""
    calls, call_any = [], Program.__call__

    def run(self, *args, **kwargs):
        out = call_any(self, *args, **kwargs)
        if self is lm.engine.programs[program]:
            calls.append(jax.block_until_ready(out))
            if len(calls) == call:
                raise KeyboardInterrupt
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "__call__", run)
        yield


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_loop_over_a_stream_leaves_a_session_that_goes_on(letters, error):
    session = letters.session()
    stream = session.stream("abc", max_new_tokens=40)
    with pytest.raises(error):
        for piece in stream:
            if "f" in piece:
                raise error
    session.generate(max_new_tokens=40)  # although the stream is still held
    assert said(session) == TEXT
    assert list(stream) == [] and stream.completion.finish_reason == "cancelled"


def test_a_broken_loop_leaves_a_session_that_goes_on(letters):
    session = letters.session()
    for _ in session.stream("abc", max_new_tokens=40):
        break
    assert said(session).startswith("abcd")
    session.generate(max_new_tokens=40)
    assert said(session) == TEXT


def test_an_interrupted_decoding_keeps_what_was_read_before(letters):
    session, pieces = letters.session(), []
    with interrupted(letters, "decode", 3), pytest.raises(KeyboardInterrupt):
        for piece in session.stream("abc", max_new_tokens=40):
            pieces.append(piece)
    assert "".join(pieces) == "defghijkl" and said(session) == "abcdefghijkl"
    session.generate(max_new_tokens=40)
    assert said(session) == TEXT


def test_an_interrupted_wait_keeps_what_was_made(letters, monkeypatch):
    session, plain, blocks = letters.session(), Run._timed, []

    @contextmanager
    def timed(self, name):
        with plain(self, name):
            yield
        blocks.append(name)
        if len(blocks) == 3:  # prefill, the first token, four more
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_timed", timed)
    stream = session.stream("abc", max_new_tokens=40)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert said(session) == "abcdefgh" and stream.completion.text == "defgh"
    session.generate(max_new_tokens=40)
    assert said(session) == TEXT


@pytest.mark.parametrize("program", ["prefill", "init_state", "decode"])
def test_a_generation_interrupted_anywhere_leaves_a_session_that_works(lm, program):
    session = lm.session()
    session.append(A)
    before = history(session)
    with interrupted(lm, program), pytest.raises(KeyboardInterrupt):
        session.generate(B, **NEW)
    first = lm.generate([A + B], max_new_tokens=1)[0].tokens
    assert history(session) == (A + B + first if program == "decode" else before)
    rest = [] if program == "decode" else B
    expected = lm.generate([history(session) + rest], **NEW)[0].tokens
    assert session.generate(rest, **NEW).tokens == expected


def test_an_interrupted_turn_is_as_if_it_had_not_been(lm):
    session = lm.session()
    session.append(A)
    with interrupted(lm, "prefill"), pytest.raises(KeyboardInterrupt):
        session.append(B)
    assert history(session) == A
    session.append(B)
    assert session.generate(**NEW).tokens == lm.generate([A + B], **NEW)[0].tokens


def test_the_first_turn_can_be_interrupted(lm):
    session = lm.session()
    with interrupted(lm, "prefill"), pytest.raises(KeyboardInterrupt):
        session.append(A)
    assert history(session) == []
    assert session.generate(A, **NEW).tokens == lm.generate([A], **NEW)[0].tokens


@pytest.mark.parametrize(
    "call",
    [
        lambda session, path: session.append("z"),
        lambda session, path: session.fork(),
        lambda session, path: session.save(path / "file"),
        lambda session, path: session.reserve(500),
        lambda session, path: session.stream("z"),
        lambda session, path: session.lm.generate("z", prefix=session),
    ],
    ids=["append", "fork", "save", "reserve", "stream", "prefix"],
)
def test_the_next_call_ends_a_stream(letters, call, tmp_path):
    session = letters.session()
    stream = session.stream("abc", max_new_tokens=40)
    first = next(stream)
    call(session, tmp_path)
    assert said(session).startswith("abc" + first) and list(stream) == []
    assert stream.completion.text.startswith(first)


def test_a_stream_that_was_not_begun_changes_nothing(letters):
    session = letters.session()
    session.append("abc")
    stream = session.stream("x", max_new_tokens=40)
    session.generate(max_new_tokens=40)
    assert said(session) == TEXT and list(stream) == []
