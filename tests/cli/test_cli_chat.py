"""`jaxinfer chat` with piped input, and how turns join in the cache."""

import json

import pytest

import jaxinfer as ji
from jaxinfer.cli.chat import Conversation

SETTINGS = {"max_new_tokens": 5}


@pytest.fixture
def chat(run, piped, model):
    def call(text: str, *options: str):
        piped(text)
        return run("chat", "--model", model, "-n", "5", *options)

    return call


def test_every_line_gets_a_reply_as_json(chat):
    result = chat("hello\n\nand you?\n/exit\nnot read\n", "--json")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0 and len(records) == 2
    assert {"text", "tokens", "finish_reason", "stats"} <= set(records[0])
    assert records[1]["stats"]["prompt_tokens"] < 40  # only the new turn was read


def test_streamed_replies_equal_those_in_json(chat):
    texts = [json.loads(line)["text"] for line in chat("hi\nand\n", "--json").out.splitlines()]
    assert chat("hi\nand\n").out == "".join(text + "\n" for text in texts)


def test_a_restored_conversation_goes_on_where_it_was_saved(chat, tmp_path):
    file = tmp_path / "talk.safetensors"
    whole = chat("one\ntwo\n").out
    first = chat(f"one\n/save {file}\n").out
    rest = chat("two\n", "--restore", str(file)).out
    assert first + rest == whole
    assert chat(f"/restore {file}\ntwo\n").out == rest


def test_reset_starts_again(chat):
    assert chat("one\n/reset\none\n").out == 2 * chat("one\n").out


def test_the_cache_holds_the_whole_conversation_as_the_template_writes_it(lm):
    talk = Conversation(lm, ji.full(), "be kind", SETTINGS, as_json=False)
    for ends in (False, True):  # a reply that was cut, then one that ended by itself
        talk.session = lm.session()
        reply = talk.session.generate(
            lm.tokenizer.encode(talk.turn("one"), add_special=False), max_new_tokens=3
        )
        if ends:
            talk.session.append([0, 257])
        held = talk.session.tokens + talk.session.pending
        joined = lm.tokenizer.decode(held, skip_special=False) + talk.turn("two")
        said = lm.tokenizer.decode(reply.tokens + [0] * ends, skip_special=False)
        assert joined == (
            f"<s>[system] be kind\n[user] one\n[assistant] {said}</s>\n[user] two\n[assistant] "
        )


def test_ctrl_c_ends_a_reply_and_the_conversation_goes_on(lm, monkeypatch, capsys):
    talk = Conversation(lm, ji.full(), None, {"max_new_tokens": 40}, as_json=False)
    pieces = []

    def interrupt(piece="", **_):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)
    assert talk.say("one")
    held = lm.tokenizer.decode(talk.session.tokens + talk.session.pending, skip_special=False)
    monkeypatch.undo()
    assert held.startswith("<s>[user] one\n[assistant] " + pieces[0])
    assert len(talk.session.tokens) < 60
    assert talk.say("two") and capsys.readouterr().out


@pytest.mark.parametrize("line", ["/save", "/nonsense", "/restore /no/such/file"])
def test_a_wrong_command_ends_a_script(chat, line):
    result = chat(f"{line}\nhello\n")
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1


def test_a_model_without_a_chat_template_is_refused(run, piped, plain_model):
    piped("hello\n")
    result = run("chat", "--model", plain_model)
    assert result.code == 2 and "chat template" in result.err
