"""Valid tokenizer folders and seeded mutations of what their files hold."""

import base64
import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import tokenizers
from tiny_checkpoints import backend, vocabulary
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

TEXTS = ("", "a", "Hello  wörld's 12345\n\n\tx ", "日本語 😀 e\u0301 <s>x</s>", "aaaa " * 100)
TRIE = [256 << 10, *[0] * 255, *[0] * 97, 0x100 | 97, *[0] * 158]
"""A double array of 512 units that maps "a" to the text at offset 0."""
CHARSMAP = base64.b64encode(struct.pack("<I512I", 2048, *TRIE) + b"b\0").decode()
CONFIG = {
    "tokenizer_class": "GPT2TokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "add_bos_token": False,
    "additional_special_tokens": ["<pad>"],
    "added_tokens_decoder": {"258": {"content": "</s>", "special": True}},
    "eos_token_ids": [3],
}


_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
GGUF_METADATA: list[dict[str, Any]] = [
    {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eot_token_id": 259,
    },
    {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": _PIECES,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(_PIECES))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.unknown_token_id": 0,
    },
]


def _byte_level() -> tokenizers.Tokenizer:
    made = backend()
    first = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}|\s+(?!\S)|\s+"), "isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([first, rest])
    made.normalizer = normalizers.NFC()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 257)]
    )
    return made


def _sentencepiece() -> tokenizers.Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5, "<0x0A>": 6}
    model = models.BPE(vocab, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


def _unigram() -> tokenizers.Tokenizer:
    vocab = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁a", -2.5), ("</s>", 0.0)]
    made = tokenizers.Tokenizer(models.Unigram(vocab, 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.BertProcessing(("</s>", 4), ("</s>", 4))
    return made


def _word_pieces() -> tokenizers.Tokenizer:
    vocab = {"[UNK]": 0, "a": 1, "##a": 2, "b": 3, "[SEP]": 4}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def documents() -> list[dict[str, Any]]:
    """The content of valid tokenizer.json files of every model and many steps."""
    made = [_byte_level(), _sentencepiece(), _unigram(), _word_pieces()]
    result = [json.loads(tokenizer.to_str()) for tokenizer in made]
    for document in result:
        document["truncation"] = document["padding"] = None
    result[2]["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}
    return result


HOSTILE = (
    None,
    True,
    -1,
    0,
    2**31,
    2**32,
    2**64,
    10**30,
    1e308,
    0.5,
    "",
    "a",
    "\ud800",
    "\0",
    "▁" * 300,
    "x" * 100_000,
    [],
    {},
    [[]],
    [None],
    {"": 0},
    ["a", "a"],
    "(a+)+$",
    "(?<x>a)\\g<x>",
    "[",
    {"Regex": "(.|.)*x"},
    {"Regex": ""},
    {"String": ""},
    {"String": "a"},
    {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 30},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 200},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "bb"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "FixedLength", "length": 0},
    {"type": "Strip", "content": "a", "start": 0, "stop": 200},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "always"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    {"type": "ByteFallback"},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"id": 3, "content": "a"},
    {"id": 10**9, "content": "a", "special": True},
    {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5},
    {"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_id": 0, "pad_token": "a"},
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in list(entries)[:40]:
            found += _places(entry, (*path, key))
    return found


def mutated(value: Any, source: random.Random) -> Any:
    """`value` with one to three of its places replaced, removed, repeated or nested."""
    value = copy.deepcopy(value)
    for _ in range(source.randint(1, 3)):
        places = [place for place in _places(value) if place]
        if not places:
            break
        path = source.choice(places)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key = path[-1]
        action = source.randrange(6)
        if action < 3:
            holder[key] = copy.deepcopy(source.choice(HOSTILE))
        elif action == 3:
            del holder[key]
        elif action == 4 and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * source.choice((1, 40))
        else:
            inner = holder[key]
            for _ in range(source.choice((1, 5, 200))):
                inner = source.choice(([inner], {"type": "Sequence", "normalizers": [inner]}))
            holder[key] = inner
    return value


def write_mutation(folder: Path, seed: int) -> None:
    """A tokenizer folder whose files are valid but for the mutations of `seed`."""
    source = random.Random(seed)
    document = source.choice(documents())
    config = CONFIG
    files: dict[str, Any] = {}
    if source.random() < 0.3:
        files["vocab.json"] = document["model"]["vocab"]
        config = config | {"tokenizer_class": source.choice(("GPT2Tokenizer", "LlamaTokenizer"))}
        files["added_tokens.json"] = {"<new>": 300}
        merges = document["model"].get("merges", [])
        (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges))
    else:
        files["tokenizer.json"] = document
    files["tokenizer_config.json"] = config
    files["special_tokens_map.json"] = {"bos_token": "<s>", "unk_token": {"content": "<unk>"}}
    name = source.choice(["tokenizer.json", *files])
    if name in files:
        files[name] = mutated(files[name], source)
    for path, value in files.items():
        text = json.dumps(value)
        if source.random() < 0.05:
            cut = source.randrange(len(text))
            text = text[:cut] + source.choice(("", "[" * 10_000, "\0", "}")) + text[cut + 1 :]
        (folder / path).write_text(text)
