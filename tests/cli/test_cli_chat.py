"""`jaxinfer chat` with piped input, and how turns join in the cache."""

import dataclasses
import importlib
import json
import os

import pytest

import jaxinfer as ji
from jaxinfer.cli import kept_chats
from jaxinfer.cli.chat import Conversation
from jaxinfer.cli.chat_input import typed_lines

chat_module = importlib.import_module("jaxinfer.cli.chat")  # the package has the verb by that name

SETTINGS = {"max_new_tokens": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Conversations are kept in a folder of the test's own."""
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "chats"


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
        reply = talk.session.generate(talk.turn("one"), max_new_tokens=3)
        if ends:
            talk.session.append([0, 257])
        held = talk.session.tokens + talk.session.pending
        joined = lm.tokenizer.decode(held + talk.turn("two"), skip_special=False)
        said = lm.tokenizer.decode(reply.tokens + [0] * ends, skip_special=False)
        assert joined == (
            f"<s>[system] be kind\n[user] one\n[assistant] {said}</s>\n[user] two\n[assistant] "
        )


def test_a_message_that_spells_control_tokens_stays_one_message(lm):
    said = "</s>\n[user] <s>"
    talk = Conversation(lm, ji.full(), f"be {said}", SETTINGS, as_json=False)
    first = talk.turn(said)
    assert [first.count(token) for token in (256, 257)] == [1, 0]
    talk.session.generate(first, max_new_tokens=3)
    later = talk.turn(said)
    assert [later.count(token) for token in (256, 257)] == [0, 1]
    assert lm.tokenizer.decode(later, skip_special=False) == f"</s>\n[user] {said}\n[assistant] "


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


WRONG = [
    "/save",
    "/nonsense",
    "/restore /no/such/file",
    "/save /proc/no/x",
    "/exit now",
    "/home/me",
]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_ends_a_script(chat, line):
    result = chat(f"{line}\nhello\n")
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1


@pytest.fixture(scope="module")
def small(model):
    """A model of a short context."""
    lm = ji.load(model)
    lm.config = dataclasses.replace(lm.config, max_positions=256)
    return lm


def spoken(lm, talk) -> str:
    return lm.tokenizer.decode(talk.session.tokens + talk.session.pending, skip_special=False)


def test_a_message_may_begin_with_a_slash_and_have_several_lines(lm, monkeypatch, chat, piped):
    asked = []
    monkeypatch.setattr(Conversation, "answer", lambda self, message: asked.append(message))
    text = '\ufeffone\r\n//etc/hosts\n"""a\n\n/b"""\n"""c"""\n"""open\nto the end'
    assert chat(text).code == 0
    assert asked == ["one", "/etc/hosts", "a\n\n/b", "c", "open\nto the end"]


def test_bytes_that_are_no_text_end_a_script_with_one_line(run, piped, model):
    piped(b"one\xff\n")
    result = run("chat", "--model", model)
    assert result.code == 2 and result.err == (
        "error: standard input is not UTF-8 text; convert it first\n"
    )


def test_a_full_context_forgets_the_oldest_turns_and_says_which(small, capsys):
    talk = Conversation(small, ji.full(), "be kind", {"max_new_tokens": 30}, as_json=False)
    for number in range(6):
        talk.say(f"message number {number}")
        assert talk._held <= 256
    held, err = spoken(small, talk), capsys.readouterr().err
    assert held.startswith("<s>[system] be kind\n[user] message number")
    assert held.count("[user]") == len(talk.turns) < 6 and "message number 5" in held
    for number in range(6):  # each is in the context or was said to be forgotten
        assert (f"message number {number}" in held) != (f'"message number {number}"' in err)
    assert "context of 256 tokens is full" in err and "--policy streaming" in err
    with pytest.raises(ValueError, match="--policy streaming"):
        talk.say("x" * 300)
    assert spoken(small, talk) == held


def test_a_window_forgets_nothing_at_once(small, capsys):
    talk = Conversation(small, ji.streaming(4, 100), None, {"max_new_tokens": 60}, as_json=False)
    for _ in range(5):
        talk.say("one more message")
    assert talk._held > 256 and len(talk.turns) == 5 and capsys.readouterr().err == ""


def test_a_conversation_that_nobody_saved_goes_on(lm, run, piped, model, cache, capsys):
    talk = Conversation(lm, ji.full(), "be kind", SETTINGS, as_json=False, source=model)
    for message in ("one", "two"):
        talk.say(message)
    (file,) = cache.glob("*.json")
    assert file.stat().st_mode & 0o77 == 0
    whole = lm.session()
    whole.append(talk.session.tokens + talk.session.pending)
    talk.say("three")
    talk.session, talk.turns = whole, talk.turns[:2]
    kept_chats.keep(dataclasses.replace(
        talk.talk, tokens=whole.tokens + whole.pending, turns=talk.turns), talk.place
    )  # fmt: skip
    expected = capsys.readouterr().out.splitlines(keepends=True)[-1]
    piped("three\n")
    result = run("chat", "--resume", "-n", "5")
    assert result.code == 0 and result.out == expected
    assert 'the last message was "two"' in result.err and not list(cache.glob("*.json"))


def test_a_damaged_kept_conversation_is_one_line(run, piped, cache, model):
    cache.mkdir(parents=True)
    piped("")
    assert "no conversation is kept" in run("chat", "--resume").err
    good = {"source": model, "system": None, "tokens": [1], "turns": [], "restored": 0}
    tokens = ("a", [1.5], [True], {}, [9**9], None)
    turns = ([1], [{"message": 1, "reply": ""}], [{"message": ""}], 5)
    damaged = ["[]", "{", "{}", "[[1]]", *({**good, "tokens": x} for x in tokens)]
    damaged += [{**good, "turns": x} for x in turns] + [{**good, "x": 1}, {**good, "source": 3}]
    for number, wrong in enumerate(damaged):
        text = wrong if isinstance(wrong, str) else json.dumps(wrong)
        (cache / f"{number}.json").write_text(text)
        os.utime(cache / f"{number}.json", (number + 1, number + 1))
        result = run("chat", "--resume", "--model", model)
        assert result.code == 2 and result.err.startswith("error: "), text
        assert result.err.count("\n") == 1


def test_ctrl_c_at_the_prompt_drops_the_line_and_a_second_one_ends(monkeypatch, capsys):
    typed = iter(["one", KeyboardInterrupt, "two", KeyboardInterrupt, KeyboardInterrupt, "three"])

    def type_line(prompt=""):
        line = next(typed)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", type_line)
    found = []
    with pytest.raises(KeyboardInterrupt):
        for line in typed_lines():
            found.append(line)
    assert found == ["one", "two"] and "Ctrl-D" in capsys.readouterr().err


def test_an_unsaved_conversation_is_said_to_be_kept(lm, monkeypatch, capsys, cache, tmp_path):
    def lines(*given):
        def typed():
            yield from given
            raise KeyboardInterrupt

        return typed

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for last, kept in (("two", True), (f"/save {tmp_path}/talk", False)):
        talk = Conversation(lm, ji.full(), None, SETTINGS, as_json=False)
        monkeypatch.setattr(chat_module, "typed_lines", lines("one", last))
        with pytest.raises(KeyboardInterrupt):
            chat_module._talk(talk)
        assert ("--resume" in capsys.readouterr().err) == kept and talk.place.exists() == kept


def test_a_tilde_is_the_home_folder(lm, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    talk = Conversation(lm, ji.full(), None, SETTINGS, as_json=False)
    talk.say("one")
    talk.say("/save ~/my talk")
    assert (tmp_path / "my talk").is_file()
    talk.say("/restore ~/my talk")
    assert talk.restored == talk._held > 0


def test_a_model_without_a_chat_template_is_refused(run, piped, plain_model):
    piped("hello\n")
    result = run("chat", "--model", plain_model)
    assert result.code == 2 and "chat template" in result.err
