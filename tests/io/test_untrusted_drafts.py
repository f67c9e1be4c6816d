"""Drafts are as untrusted as weights: sizes are held against the target and the file, and the
tokens that a draft proposes against the target's vocabulary."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.io.draft import BorrowingDraft, read_draft, save_draft
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.recurrent import RecurrentConfig, init_cell
from tests.factories import lm_of

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def folder(tmp_path):
    target = lm_of()
    cfg = RecurrentConfig(hidden_size=32, intermediate_size=8, blocks=2, vocab_size=20)
    params = init_cell(cfg, jax.random.key(0))
    tokens = np.arange(0, 60, 3, dtype=np.int32)
    draft = BorrowingDraft(cfg, params, tokens, "llama", fingerprint(target.params))
    save_draft(tmp_path / "draft", draft)
    return tmp_path / "draft"


def in_config(folder, change):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def in_weights(folder, change):
    path = folder / "draft.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


CONFIGS = {
    "a million blocks": (lambda d: d["recurrent"].update(blocks=1_000_000), "blocks must be"),
    "more blocks than the file": (lambda d: d["recurrent"].update(blocks=3), "is missing"),
    "fewer blocks than the file": (lambda d: d["recurrent"].update(blocks=1), "is not known"),
    "another width": (lambda d: d["recurrent"].update(hidden_size=2**31 - 1), "the target's 32"),
    "a huge size": (lambda d: d["recurrent"].update(intermediate_size=2**31 - 1), "expected I8"),
    "a fraction": (lambda d: d["recurrent"].update(intermediate_size=8.0), "a whole number"),
    "infinity": (lambda d: d["recurrent"].update(blocks=float("inf")), "a whole number"),
    "a truth value": (lambda d: d["recurrent"].update(blocks=True), "a whole number"),
    "another vocabulary": (lambda d: d["recurrent"].update(vocab_size=19), "has 20 tokens"),
    "an unknown size": (lambda d: d["recurrent"].update(depth=1), "depth"),
    "no record": (lambda d: d.pop("record"), "no record"),
    "a target that is a list": (lambda d: d.update(target=[1]), "no target"),
    "an unknown field": (lambda d: d.update(more=1), "unknown field 'more'"),
    "no sizes": (lambda d: d.pop("recurrent"), "either 'recurrent' or 'model'"),
    "sizes that are a list": (lambda d: d.update(recurrent=[1, 2]), "must be an object"),
}
WEIGHTS = {
    "negative tokens": (lambda t: t.update(vocabulary=t["vocabulary"] - 3670), "outside the"),
    "tokens past the target's": (lambda t: t.update(vocabulary=t["vocabulary"] + 5), "outside the"),
    "a token twice": (lambda t: t.update(vocabulary=t["vocabulary"] * 0), "a token twice"),
    "no tokens": (lambda t: t.update(vocabulary=t["vocabulary"][:0]), "proposes 0 tokens"),
    "tokens in rows": (
        lambda t: t.update(vocabulary=t["vocabulary"].reshape(4, 5)), "expected [n]"
    ),
    "tokens as fractions": (
        lambda t: t.update(vocabulary=t["vocabulary"].astype(np.float32)), "expected I32"
    ),
    "no vocabulary": (lambda t: t.pop("vocabulary"), "'vocabulary' is missing"),
    "no scale": (lambda t: t.pop("join.weight#scale"), "'join.weight#scale' is missing"),
    "an array more": (lambda t: t.update(more=np.zeros(3, np.int8)), "'more' is not known"),
    "a scale of infinity": (
        lambda t: t["join.weight#scale"].fill(np.inf), "numbers that are not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, words", CONFIGS.values(), ids=CONFIGS)
def test_a_forged_config_is_refused_in_one_line(folder, change, words):
    in_config(folder, change)
    check_refused(folder, words)


@pytest.mark.parametrize("change, words", WEIGHTS.values(), ids=WEIGHTS)
def test_forged_weights_are_refused_in_one_line(folder, change, words):
    in_weights(folder, change)
    check_refused(folder, words)


def check_refused(folder, words):
    with pytest.raises(ValueError) as refused:
        read_draft(folder, lm_of().params)
    line = str(refused.value)
    assert str(folder) in line and words in line, line
    assert line.isprintable() and len(line) < 1000


def test_the_good_draft_is_read(folder):
    assert len(read_draft(folder, lm_of().params).vocabulary) == 20
