"""The script behind `checkpoints/tiny-llama`: tokenizer, options, a very small run end to end."""

import json

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.train.texts import write_source
from tools import train_tiny

SENTENCES = [
    "In the beginning was a small model, and the model had 96 entries.",
    "It read what it was given; it knew no more than that.",
    "Chapter 7: of naïve tokens — and of tabs\tand lines.\n\nThe end",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_tiny.train_tokenizer(iter(SENTENCES * 20), 400, path)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens_and_the_end_is_token_zero(tokenizer):
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]
    assert tokenizer.token_to_id(train_tiny.END) == 0


def test_held_out_and_skipped_documents_are_not_trained_on(tmp_path):
    write_source(tmp_path, "kjv", [("Genesis", "kept"), ("Romans", "held out")])
    write_source(tmp_path, "brown", [("ca01", "kept too"), ("ck01", "held out")])
    texts = [text for _, text in train_tiny.training_documents(tmp_path, ["kjv", "brown"])]
    assert texts == ["kept\n", "kept too\n"]


def test_the_default_model_is_a_grouped_query_llama():
    cfg = train_tiny.model_config(4096, 128, 6, 512)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (4, 2, 32)
    assert train_tiny.model_config(4096, 192, 6, 512).group_size == 3


def test_snapshot_steps_are_shared_by_runs_of_any_length():
    short, long = train_tiny.log_spaced(300), train_tiny.log_spaced(1200)
    assert short[0] == 0 and short[-1] == 300
    assert set(short[:-1]) <= set(long)


def test_a_run_refuses_other_options_but_a_new_length_before_the_decay(tmp_path):
    options = {"steps": 1000, "width": 128}
    train_tiny.check_options(tmp_path, options)
    (tmp_path / "state" / "600").mkdir(parents=True)
    train_tiny.check_options(tmp_path, options | {"steps": 800})
    with pytest.raises(typer.BadParameter, match="steps"):
        train_tiny.check_options(tmp_path, options | {"steps": 700})
    with pytest.raises(typer.BadParameter, match="width"):
        train_tiny.check_options(tmp_path, {"steps": 800, "width": 64})


@pytest.mark.slow
def test_a_small_run_writes_a_model_its_card_and_its_snapshots(tmp_path):
    from jaxinfer.io.load import load_checkpoint
    from tools.tiny_card import parameters_digest

    books = [("Genesis", " ".join(SENTENCES * 40)), ("Romans", " ".join(SENTENCES * 4))]
    write_source(tmp_path / "texts", "kjv", books)
    train_tiny.main(
        run_dir=tmp_path / "run", out=tmp_path / "model", texts=tmp_path / "texts",
        snapshots=tmp_path / "snapshots", source=None, steps=12, batch=2, context=32, short=16,
        width=32, layers=1, vocab=320, peak=1e-2, seed=0, save_every=6, log_every=1, eval_windows=4,
    )  # fmt: skip
    checkpoint = load_checkpoint(tmp_path / "model", dtype="bfloat16")
    assert checkpoint.config.num_layers == 1
    text = SENTENCES[1]
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode(text)) == text
    card = (tmp_path / "model" / "README.md").read_text()
    assert parameters_digest(checkpoint.params) in card and "| kjv | 1 |" in card
    steps = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert steps == ["step-000000", "step-000010", "step-000012"]
    assert json.loads((tmp_path / "run" / "heldout.json").read_text())["kjv"]["documents"] == 1
