"""The text of a continuation, streamed or whole, is what a decoding of everything adds to the
prompt's: checked against the decoders of `tokenizers` on random tokens."""

from os.path import commonprefix

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxinfer.decode.sampling import Sampler
from jaxinfer.decode.text import TextStream
from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.lm import LM
from tests.factories import lm_of

WORDS = ["▁The", "▁capital", "▁", "is", "▁Paris", ".", "▁▁x", "é", "日本"]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def of_vocabulary(words: list[str], decoder) -> Tokenizer:
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    backend.decoder = decoder
    backend.add_special_tokens(SPECIAL)
    return Tokenizer.from_backend(backend)


def sentencepiece() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return of_vocabulary(WORDS + BYTES, decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)]))


def byte_level() -> Tokenizer:
    return of_vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), decoders.ByteLevel())


MAKERS = {
    "sentencepiece": sentencepiece,
    "metaspace": lambda: of_vocabulary(WORDS, decoders.Metaspace(prepend_scheme="first")),
    "bytes": byte_level,
    "wordpiece": lambda: of_vocabulary(
        ["the", "##ing", "do", "n't", "'s", ".", ",", "##x", "paris"], decoders.WordPiece()
    ),
}


def random_ids(name: str, tokenizer: Tokenizer, rng, count: int) -> list[int]:
    """Random tokens; bytes are at times those of characters, of a fallback always."""
    id_of = tokenizer.backend.token_to_id
    words = [i for i in range(tokenizer.vocab_size) if tokenizer.backend.id_to_token(i) in WORDS]
    special = [id_of(text) for text in SPECIAL]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids: list[int] = []
    while len(ids) < count:
        kind = rng.random()
        char = str(rng.choice(list("aé日\U0001f600\ufffd"))).encode()
        if kind < 0.15:
            ids.append(int(rng.choice(special)))
        elif name == "sentencepiece" and kind < 0.5:
            ids += [id_of(BYTES[byte]) for byte in char]
        elif name == "bytes" and kind < 0.7:
            coded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            ids += [id_of(c) for c in coded.pre_tokenize_str(char.decode())[0][0]]
        elif name == "bytes":
            ids.append(id_of(str(rng.choice(letters))))
        elif name == "wordpiece":
            ids.append(int(rng.integers(9)))
        else:
            ids.append(int(rng.choice(words)))
    return ids


@pytest.mark.parametrize("name", MAKERS)
def test_a_continuation_is_what_it_adds_to_the_decoded_whole(name):
    tokenizer, rng = MAKERS[name](), np.random.default_rng(0)
    for _ in range(150):
        ids = random_ids(name, tokenizer, rng, int(rng.integers(1, 200)))
        border = int(rng.integers(len(ids)))
        if name == "sentencepiece":  # a run of bytes that is no UTF-8 has no characters at all
            while "\ufffd" in tokenizer.decode(ids[:border]) and border:
                border -= 1
        step = int(rng.choice([1, 2, 5, 300]))
        before, after = ids[:border], ids[border:]
        stream = TextStream(tokenizer, before=before)
        pieces = [stream.push(after[i : i + step]) for i in range(0, len(after), step)]
        pieces.append(stream.push([], last=True))
        first, whole = tokenizer.decode(before), tokenizer.decode(ids)
        expected = whole[len(commonprefix([first, whole])) :]
        assert "".join(pieces) == stream.text == expected, (before, after, step)


@pytest.mark.parametrize("name", MAKERS)
def test_the_turns_of_a_text_join_to_the_whole(name):
    tokenizer, rng = MAKERS[name](), np.random.default_rng(1)
    for _ in range(100):
        ids = random_ids(name, tokenizer, rng, int(rng.integers(1, 60)))
        text, done, owed = "", 0, 0
        while done < len(ids):
            count = int(rng.integers(1, 8))
            stream = TextStream(tokenizer, before=ids[:done], owed=owed, goes_on=True)
            text += stream.push(ids[done : done + count], last=True)
            done, owed = done + count, stream.owed
        whole = tokenizer.decode(ids)
        assert text == (whole.rstrip("\ufffd") if owed else whole), ids


def test_a_character_that_the_prompt_began_belongs_to_the_continuation():
    tokenizer = byte_level()
    ids = [tokenizer.backend.token_to_id(c) for c in "aÃ©"]  # a and the two bytes of é
    assert TextStream(tokenizer, before=ids[:2]).push(ids[2:], last=True) == "é"
    stream = TextStream(tokenizer, before=ids[:2])
    assert stream.push(ids[:1], last=True) == "a"  # which leaves the prompt's byte alone


def test_stop_strings_may_hold_names_of_special_tokens():
    tokenizer = sentencepiece()
    id_of = tokenizer.backend.token_to_id
    end, the, new_line = id_of("<|im_end|>"), id_of("▁The"), id_of("<0x0A>")
    for step in (1, 4):
        ids = [the, the, end, new_line, the]
        stream = TextStream(tokenizer, stop=["<|im_end|>\n"], before=[the])
        pieces = [stream.push(ids[i : i + step]) for i in range(0, 5, step)]
        assert stream.stopped and "".join(pieces) == stream.text == " The The"
    other = TextStream(tokenizer, stop=["<|im_end|>\n"], before=[the])
    assert other.push([the, end]) == " The" and other.push([the]) == " The"
    assert other.push([end], last=True) == "" and not other.stopped and other.text == " The The"


def only(token: int, vocab: int) -> Sampler:
    return Sampler(logit_bias={i: float("-inf") for i in range(vocab) if i != token})


def test_generation_sessions_and_stop_strings_see_the_first_space():
    tokenizer = sentencepiece()
    small = lm_of("llama")
    lm = LM(small.config, small.params, tokenizer, "spm")
    prompt = [tokenizer.backend.token_to_id(w) for w in ("▁The", "▁capital", "is")]
    paris = tokenizer.backend.token_to_id("▁Paris")
    sampler = only(paris, lm.config.vocab_size)
    options = {"sampler": sampler, "max_new_tokens": 2, "ignore_eos": True}
    assert lm.generate([prompt], **options)[0].text == " Paris Paris"
    assert "".join(lm.stream(prompt, **options)) == " Paris Paris"
    session = lm.session()
    session.append(prompt)
    assert [session.generate(**options).text for _ in range(2)] == [" Paris Paris"] * 2
    stopped = lm.generate([prompt], stop=" Paris", **options)[0]
    assert (stopped.text, stopped.tokens, stopped.finish_reason) == ("", [paris], "stop")
