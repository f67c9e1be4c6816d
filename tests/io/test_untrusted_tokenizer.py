"""A folder's tokenizer is untrusted: nothing in it runs, hangs, grows without bound or panics."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import backend
from tokenizer_mutations import GGUF_METADATA, TEXTS, mutated, write_mutation

from jaxinfer.io.gguf_pre import PRE
from jaxinfer.io.gguf_tokenizer import tokenizer_from_metadata
from jaxinfer.io.patterns import fewest_characters
from jaxinfer.io.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("")
class EvilTokenizer:
    pass
"""
SLOW = {
    "sentencepiece": {"tokenizer.model": "x"},
    "word pieces": {"vocab.txt": "a\\nb\\n"},
    "merges": {"vocab.json": '{"a": 0}', "merges.txt": ""},
    "nothing": {},
}


def evil_folder(folder: Path, files: dict[str, str]) -> Path:
    auto = {"AutoTokenizer": ["evil.EvilTokenizer", None], "AutoConfig": "evil.EvilTokenizer"}
    content = {"auto_map": auto, "tokenizer_class": "EvilTokenizer"}
    config = {"model_type": "evil"} | content
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_code_of_a_folder_never_runs_whatever_standard_input_says(tmp_path):
    folders = [evil_folder(tmp_path / name, files) for name, files in SLOW.items()]
    script = (
        "import sys, jaxinfer as ji\n"
        "from jaxinfer.io.tokenizer import Tokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    for load in (Tokenizer.load, ji.load):\n"
        "        try:\n"
        "            load(folder)\n"
        "        except ValueError as error:\n"
        "            print(str(error).replace(folder, ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        input="y\n" * 1000,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("ran")) and "[y/N]" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(folders)
    assert sum("is not run" in line for line in lines) == 1


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def steps(*given: dict) -> dict:
    return {"type": "Sequence", "normalizers": list(given)}


def nested(depth: int) -> dict:
    step = {"type": "NFC"}
    for _ in range(depth):
        step = steps(step)
    return step


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(*pieces: dict, ids: int = 257) -> dict:
    token = {"id": "<s>", "ids": [ids], "tokens": ["<s>"]}
    return {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": {"<s>": token}}


def added(content: str, number: int) -> list[dict]:
    return [{"id": number, "content": content, "special": True}]


def model(**fields: object) -> dict:
    return {"type": "BPE", "vocab": {"a": 0}, "merges": []} | fields


TEXT, START = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
DOUBLE = replace({"String": "a"}, "aa")
HOSTILE = {
    "doubling": ("normalizer", steps(*[DOUBLE] * 30), "times as long"),
    "doubling in both": ("normalizer", steps(*[DOUBLE] * 5), "times as long"),
    "forty steps": ("normalizer", steps(*[DOUBLE] * 40), "at most 32 steps"),
    "a long replacement": ("normalizer", replace({"String": "a"}, "a" * 10**6), "content"),
    "an empty pattern": ("normalizer", replace({"String": ""}, "a"), "pattern"),
    "no pattern": ("normalizer", {"type": "Replace", "content": "a"}, "no pattern"),
    "deep": ("normalizer", nested(60), "Sequence"),
    "an unknown step": ("normalizer", {"type": "Evil"}, "'Evil' is not one of"),
    "a broken table": (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="},
        "not one of SentencePiece",
    ),
    "an expression": ("pre_tokenizer", split(r"(a+)+$"), "in several ways"),
    "many ways": ("pre_tokenizer", split(r"(?:.|.){22}\z(?!)"), "too long"),
    "length 0": ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "length"),
    "the text twice": ("post_processor", template(TEXT, TEXT), "exactly once"),
    "a thousand pieces": ("post_processor", template(*[START] * 1000, TEXT), "at most 32 pieces"),
    "a foreign id": ("post_processor", template(START, TEXT, ids=300), "as 300"),
    "growing back": ("decoder", replace({"String": "a"}, "a" * 200), "times as long"),
    "a long strip": (
        "decoder",
        {"type": "Strip", "content": "a", "start": 0, "stop": 200},
        "stop that cannot be",
    ),
    "a negative id": ("model", model(vocab={"a": -1}), "id of 'a' is -1"),
    "an id beyond 32 bits": ("model", model(vocab={"a": 2**32}), "id of 'a'"),
    "an id that is text": ("model", model(vocab={"a": "0"}), "id of 'a' is '0'"),
    "one id twice": ("model", model(vocab={"a": 0, "b": 0}), "same id"),
    "a long token": ("model", model(vocab={"a" * 5000: 0}), "at most 4096"),
    "a long prefix": ("model", model(continuing_subword_prefix="a" * 10**6), "short text"),
    "an unknown merge": ("model", model(merges=["a b"]), "make a third"),
    "no model": ("model", None, "no model"),
    "scores of text": ("model", {"type": "Unigram", "vocab": [["a", "b"]]}, "score"),
    "long words": (
        "model",
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "a",
            "max_input_chars_per_word": 10**9,
        },
        "max_input_chars_per_word",
    ),
    "a long added token": ("added_tokens", added("a" * 10**5, 300), "at most 4096"),
    "an added token on another's id": ("added_tokens", added("new", 5), "have the same id 5"),
    "too many added tokens": ("added_tokens", added("new", 300) * 2**17 * 2, "at most"),
}


def load(folder: Path, **parts: object) -> Tokenizer:
    data = json.loads(backend().to_str()) | parts
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("case", HOSTILE)
def test_what_rust_cannot_handle_is_refused_in_one_line(tmp_path, case):
    part, value, words = HOSTILE[case]
    more = {"pre_tokenizer": split("a")} if part != "pre_tokenizer" else {}
    if case == "doubling in both":
        metaspace = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}
        more = {"pre_tokenizer": metaspace}
    with pytest.raises(ValueError) as caught:
        load(tmp_path, **{**more, part: value})
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 900


def test_truncation_padding_and_dropout_of_training_are_left_out(tmp_path):
    fixed = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_token": "a"}
    cut = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    random = json.loads(backend().to_str())["model"] | {"dropout": 1.0}
    loaded = load(tmp_path, padding=fixed, truncation=cut, model=random)
    assert loaded.decode(loaded.encode("hello")) == "hello" and len(loaded.encode("hello")) == 5


def test_a_text_that_the_tokenizer_cannot_take_is_refused_in_one_line(tmp_path):
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}
    loaded = load(tmp_path, model=words, pre_tokenizer=None)
    assert loaded.encode("a") == [0]
    with pytest.raises(ValueError, match="the tokenizer cannot encode the text"):
        loaded.encode("b")


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(100, 3000), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_folders_load_or_are_refused_in_one_line(tmp_path, seeds, capfd):
    loaded = 0
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_mutation(folder, seed)
        try:
            tokenizer = Tokenizer.load(folder)
            loaded += 1
            for text in TEXTS:
                tokenizer.decode(tokenizer.encode(text), skip_special=False)
            tokenizer.decode([0, 1, 2, 300, 2**31])
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 900, seed
    assert loaded > len(seeds) // 10
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_metadata_of_gguf_files_is_read_or_refused_in_one_line(capfd):
    loaded = 0
    for seed in range(200):
        source = random.Random(seed)
        metadata = mutated(source.choice(GGUF_METADATA), source)
        try:
            tokenizer = tokenizer_from_metadata(metadata, "m.gguf")
            if tokenizer is not None:
                loaded += 1
                for text in TEXTS:
                    tokenizer.decode(tokenizer.encode(text), skip_special=False)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, seed
    assert loaded > 5
    assert "panicked" not in capfd.readouterr().err


COSTLY = [
    *(r"(a|a)*b", r"(a*)*", r"(.*)*x", r"(?:a?){30}b", r"a*a*b", r"(x+x+)+y", r"(a)\1", "[", "*"),
    *(r"(?<n>a)\g<n>", r"(?:(?:a{999}){999})", "(" * 100, r"(?~ab)", r"\K", r"a{5,2}", "a" * 5000),
    *(r"(a|b|ab)*c", r"(?(1)a|b)", r"(?=a*a*b)", r"(?:a??){25}b", "a{99999999}", r"(a+){2,}b"),
]
PLAIN = [
    (r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+", 1),
    (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?| ?[^\s\p{L}]+[\r\n/]*", 1),
    (r"\d{1,3}(?=(?:\d{3})*\b)", 1),
    (r" ?[^(\s|[.,!?…。，、।۔،])]+", 1),
    (r"[\p{Lu}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+", 1),
    (r" {2,}", 2),
    (r"(?<=\p{L})(?=\p{N})", 0),
    (r"<sentinel:[0-9]+>", 12),
    ("", 0),
]


@pytest.mark.parametrize("pattern", COSTLY, ids=lambda pattern: pattern[:20])
def test_expressions_that_may_backtrack_for_long_are_refused(pattern):
    with pytest.raises(ValueError):
        fewest_characters(pattern)


@pytest.mark.parametrize("pattern, least", PLAIN)
def test_expressions_of_tokenizers_in_use_are_read(pattern, least):
    assert fewest_characters(pattern) == least


def test_every_expression_of_a_gguf_pre_tokenizer_is_cheap():
    for pre in PRE.values():
        for pattern in pre.splits:
            fewest_characters(pattern)
