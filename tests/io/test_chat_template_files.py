"""Every place of a chat template is read, and what is no template is refused in one line."""

import json

import pytest
from tiny_checkpoints import backend, write_tokenizer

from jaxinfer.io.chat_template_files import ChatTemplates, gguf_templates, read_templates
from jaxinfer.io.tokenizer import Tokenizer

NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]


def put(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def test_files_win_over_the_config(tmp_path):
    config = {"chat_template": NAMED}
    assert read_templates(tmp_path, config) == ChatTemplates("d", "t")
    put(tmp_path, "chat_template.json", json.dumps({"chat_template": "j"}))
    assert read_templates(tmp_path, config) == ChatTemplates("j", None)
    put(tmp_path, "chat_template.jinja", "f")
    assert read_templates(tmp_path, config) == ChatTemplates("f", None)
    put(tmp_path, "additional_chat_templates/tool_use.jinja", "a")
    assert read_templates(tmp_path, config) == ChatTemplates("f", "a")
    assert read_templates(tmp_path, {}) == ChatTemplates("f", "a")


def test_a_folder_without_templates(tmp_path):
    assert read_templates(tmp_path, {}) == ChatTemplates(None, None)


WRONG = [
    7, True, {"default": "x"}, [7], ["x"], [None], [[]], [{}], [{"name": "x"}], [{"template": "x"}],
    [{"name": ["x"], "template": "x"}], [{"name": "x", "template": 7}],
    [{"name": {"a": 1}, "template": "x"}], [*NAMED, {"name": "\x1b[31m", "template": None}],
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json"])
def test_what_is_no_template_is_refused(tmp_path, place, value):
    write_tokenizer(tmp_path)
    put(tmp_path, "tokenizer_config.json", "{}")
    put(tmp_path, place, json.dumps({"chat_template": value}))
    with pytest.raises(ValueError, match="chat_template must be a text") as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_both_templates_survive_a_save(tmp_path):
    own = Tokenizer.from_backend(backend(), chat_template="d\n", tool_template="t é")
    own.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.chat_template, loaded.tool_template) == ("d\n", "t é")


def test_templates_of_a_gguf_file():
    data = {"tokenizer.chat_template": "d", "tokenizer.chat_template.tool_use": "t"}
    assert gguf_templates(data, "m.gguf") == ChatTemplates("d", "t")
    assert gguf_templates({}, "m.gguf") == ChatTemplates(None, None)
    for name in data:
        for value in (7, ["x"], True, 1.5):
            with pytest.raises(ValueError, match=f"m.gguf: {name} must be a text"):
                gguf_templates({**data, name: value}, "m.gguf")
