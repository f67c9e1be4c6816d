"""The text that is nearest is the one of the same kind, and the test says when none differs."""

import numpy as np
import pytest

from jaxinfer.cli.train_options import sources_for
from jaxinfer.texts import write_source
from jaxinfer.theory.diagnose import nearest_texts
from tests.cli.conftest import byte_tokenizer
from tests.factories import lm_of
from tests.theory.test_checkpoints import CFG


def windows(low: int, high: int, seed: int) -> np.ndarray:
    """Texts of the tokens from `low` to `high`."""
    return np.random.default_rng(seed).integers(low, high, (8, 16), np.int32)


def test_the_text_of_the_same_words_is_nearest_and_the_others_differ():
    lm = lm_of("llama")
    texts = {"other": windows(30, 60, 2), "same": windows(0, 10, 3)}
    found = nearest_texts(lm, windows(0, 10, 4), texts, points=64, permutations=39)
    assert [one.name for one in found] == ["same", "other"]
    same, other = found
    assert abs(same.value) < other.value / 2
    assert same.p_value > 0.05 and other.p_value == pytest.approx(1 / 40)


def test_too_little_text_is_refused():
    lm = lm_of("llama")
    with pytest.raises(ValueError, match="text 'a' has 64 tokens in the second halves"):
        nearest_texts(lm, windows(0, 10, 0).repeat(2, axis=0), {"a": windows(0, 9, 1)}, points=128)
    with pytest.raises(ValueError, match="there are no texts to choose from"):
        nearest_texts(lm, windows(0, 10, 0), {}, points=64)
    with pytest.raises(ValueError, match="layer must be a whole number from 0 to 1"):
        nearest_texts(lm, windows(0, 10, 0), {"a": windows(0, 9, 1)}, layer=2, points=64)


def test_training_takes_the_source_that_is_nearest(tmp_path, monkeypatch, capsys):
    import jax

    from jaxinfer.cli import train_options
    from jaxinfer.lm import LM
    from jaxinfer.models.params import init_params

    monkeypatch.setattr(train_options, "WINDOW", 32)
    lm = LM(CFG, init_params(CFG, jax.random.key(0)), byte_tokenizer(None))
    words = {"brown": "abcde ", "kjv": "STUVWXYZ0123 "}
    for name, letters in words.items():
        rng = np.random.default_rng(len(letters))
        text = "".join(rng.choice(list(letters), 4000))
        name_of = "Genesis" if name == "kjv" else "ca01"
        write_source(tmp_path, name, [(name_of, text)])
    like = tmp_path / "mail.txt"
    like.write_text("".join(np.random.default_rng(9).choice(list("STUVWXYZ0123 "), 600)))
    assert sources_for(lm, None, None, tmp_path) is None
    assert sources_for(lm, ["brown"], None, tmp_path) == ["brown"]
    assert sources_for(lm, None, str(like), tmp_path) == ["kjv"]
    err = capsys.readouterr().err
    assert "kjv: " in err and "brown: " in err and "p 0.0" in err
