"""Models of others: safetensors, GGUF, configurations, tokenizers, templates, and our own folders.

The headers are read alone, as most inputs should reach the checks of numbers; the whole loads read
a model of two layers.
"""

import functools
import json
import random
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxinfer.config import ModelConfig
from jaxinfer.io import gguf_header, safetensors_reader
from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
from jaxinfer.io.convert import convert
from jaxinfer.io.gguf_tokenizer import tokenizer_from_metadata
from jaxinfer.io.load import load_checkpoint
from jaxinfer.io.tokenizer import Tokenizer
from jaxinfer.models.registry import config_from_hf
from jaxinfer.models.stack import forward
from jaxinfer.sparsity.base import Static
from tests.io import tiny_checkpoints as tiny
from tests.sparsity.stored_models import sparse_model, with_sparse_heads
from tools.fuzz.mutations import damaged_text
from tools.fuzz.target import Target

TEXTS = ("Hello, world!", "<s> a</s>", "äöü \u202e 日本", "")
MESSAGES = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "1\n2"}],
)
TEMPLATES = (
    *("{{ messages }}", "{% for i in range(10**9) %}a{% endfor %}", "{{ 'a' * 10**10 }}"),
    *("{{ [0] * 10**9 }}", "{{ messages[0] }}", "{{ x.y }}", "{{ ''.__class__ }}", "{% break %}"),
    *("{{ 'a'.join(['b' * 4000000] * 1000) }}", "{{ raise_exception('\x1b[2J') }}", "{%", "}}"),
    *("{% set a = 1 %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 2**2**30 }}"),
)


def make_header(folder: Path) -> None:
    values = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}
    save_file(values, folder / "m.safetensors", metadata={"format": "pt"})


def parse_header(folder: Path) -> None:
    path = folder / "m.safetensors"
    entries = safetensors_reader.read_header(path)
    size = path.stat().st_size
    assert all(0 <= e.start <= e.stop <= size for e in entries.values())


def make_gguf_header(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([1.0, 2.0, 3.0])
    writer.add_tensor("token_embd.weight", np.ones((3, 4), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    tiny.finish(writer)


def parse_gguf_header(folder: Path) -> None:
    path = folder / "m.gguf"
    header = gguf_header.read_header(path)
    size = path.stat().st_size
    assert all(t.offset + t.num_bytes <= size for t in header.tensors.values())


def make_gguf(folder: Path) -> None:
    tiny.gguf_file(folder / "m.gguf")


def make_own(folder: Path) -> None:
    hf = folder / "hf"
    convert(tiny.hf_folder(hf), folder / "m")
    for path in sorted(hf.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    hf.rmdir()


def make_sparse(folder: Path) -> None:
    """Our folder with a sparse block in 8 bits, a dtype for some arrays, and one of int8 rows."""
    for name, rows in (("m", False), ("rows", True)):
        cfg, params = sparse_model("llama", "linear", codes="down", dtype="bfloat16")
        selector = Static(selected=jnp.asarray([True, False]))
        params = with_sparse_heads(cfg, params, selector, keys="deferred", unions=(0.5,))
        save_checkpoint(folder / name, Checkpoint(cfg, params), int8_rows=rows)


def parse_sparse(folder: Path) -> None:
    for name in ("m", "rows"):
        loaded = load_checkpoint(folder / name, "float32")
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded.params))
        heads = loaded.params["layers"][0]["attn"].get("heads")
        assert heads is None or heads.selector.units == loaded.config.num_kv_heads
        block = loaded.params["layers"][1]["mlp"]
        if not isinstance(block, dict):
            assert block.weights.up.shape == (loaded.config.intermediate_size, 32)
            assert len(block.weights.up) % block.selector.units == 0


def parse_model(where: str, folder: Path) -> None:
    """Loads the model at a place in the folder; what was read must run."""
    check_model(load_checkpoint(folder / where, "float32"))


def check_model(loaded: Checkpoint) -> None:
    cfg = loaded.config
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded.params))
    assert _logits_shape(cfg) == (1, 3, cfg.vocab_size)
    if loaded.tokenizer is not None:
        use(loaded.tokenizer)


@functools.lru_cache(maxsize=256)
def _logits_shape(cfg: ModelConfig) -> tuple[int, ...]:
    from jaxinfer.models.params import abstract_params

    params = abstract_params(cfg, np.dtype(np.float32))
    return jax.eval_shape(functools.partial(forward, cfg), params, TOKENS).logits.shape


TOKENS = jax.ShapeDtypeStruct((1, 3), jnp.int32)


def use(tokenizer: Tokenizer) -> None:
    """Texts to ids and back: a text that a tokenizer cannot take is refused in one line too."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert len(ids) <= 10_000, f"{len(ids)} tokens of {text!r}"
        tokenizer.decode(ids)


def make_tokenizers(folder: Path) -> None:
    """A plain one, and one with a step of every kind."""
    plain, rich = folder / "plain", folder / "rich"
    for place in (plain, rich):
        place.mkdir()
        tiny.write_tokenizer(place)
    data = json.loads((plain / "tokenizer.json").read_text()) | RICH
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split", "pattern": {"Regex": "\\d{1,3}"}, "behavior": "Isolated",
                "invert": False,
            },
            data["pre_tokenizer"],
        ],
    }  # fmt: skip
    (rich / "tokenizer.json").write_text(json.dumps(data))


RICH = {
    "truncation": {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
    },
    "padding": {
        "strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3,
        "pad_type_id": 0, "pad_token": "<pad>",
    },
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"String": "  "}, "content": " "},
            {"type": "Prepend", "prepend": " "},
        ],
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
    },
}  # fmt: skip


def parse_tokenizer(folder: Path) -> None:
    for place in ("plain", "rich"):
        use(Tokenizer.load(folder / place))


def make_gguf_tokenizer(folder: Path) -> None:
    path = folder / "m.gguf"
    tiny.gguf_file(path)
    metadata = gguf_header.read_header(path).metadata
    path.unlink()
    chosen = {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
    plain = {k: list(v) if not isinstance(v, str | int | float) else v for k, v in chosen.items()}
    (folder / "metadata.json").write_text(json.dumps(plain, default=lambda x: x.item()))


def parse_gguf_tokenizer(folder: Path) -> None:
    try:
        metadata = json.loads((folder / "metadata.json").read_bytes())
    except (ValueError, RecursionError):
        return  # a header holds no such thing
    if isinstance(metadata, dict):
        found = tokenizer_from_metadata(metadata, str(folder))
        if found is not None:
            use(found)


def make_template(folder: Path) -> None:
    tiny.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(tiny.TEMPLATE)


def parse_template(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    for messages in MESSAGES:
        text = tokenizer.apply_chat_template(messages)
        assert len(text) <= 8 * 2**20


def mutate_template(rng: random.Random, _: str, data: bytes) -> bytes:
    return damaged_text(TEMPLATES)(rng, data)


FAMILIES = {
    "llama": tiny.CONFIG | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}},
    "qwen2": tiny.CONFIG | {"model_type": "qwen2", "use_sliding_window": True,
        "sliding_window": 8, "max_window_layers": 1},
    "mistral": tiny.CONFIG | {"model_type": "mistral", "sliding_window": 16},
    "gpt2": {"model_type": "gpt2", "vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_positions": 64, "layer_norm_epsilon": 1e-5},
    "opt": {"model_type": "opt", "vocab_size": 260, "hidden_size": 32, "ffn_dim": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "word_embed_proj_dim": 32},
    "mpt": {"model_type": "mpt", "vocab_size": 260, "d_model": 32, "n_layers": 2, "n_heads": 4,
        "max_seq_len": 64, "expansion_ratio": 4, "attn_config": {"alibi": True}},
    "falcon": {"model_type": "falcon", "vocab_size": 260, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True,
        "new_decoder_architecture": False, "alibi": False, "parallel_attn": True},
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": 260, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "rotary_pct": 0.25},
}  # fmt: skip


def make_configs(folder: Path) -> None:
    for name, config in FAMILIES.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


def parse_configs(folder: Path) -> None:
    """All families; those that nobody damaged take no time."""
    for path in folder.glob("*.json"):
        try:
            config = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue  # `read_json` is tried by the whole loads
        if isinstance(config, dict):
            made = config_from_hf(config)
            assert ModelConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def make_sharded(folder: Path) -> None:
    tiny.sharded_folder(folder)


HF = ("config.json", "config.json", "model.safetensors", "tokenizer*.json")
SHARDED = ("*.index.json", "*")
OWN = ("config.json", "config.json", ".zarray", "tokenizer*.json", "*")
SPARSE = ("config.json", "config.json", ".zarray", "0", "0.0")

TARGETS = (
    Target("safetensors", make_header, parse_header, share=15),
    Target("gguf-header", make_gguf_header, parse_gguf_header, share=15),
    Target("gguf", make_gguf, functools.partial(parse_model, "m.gguf"), share=3),
    Target("hf-config", make_configs, parse_configs, share=10),
    Target("hf-folder", tiny.hf_folder, functools.partial(parse_model, "."), HF, share=4),
    Target(
        "hf-sharded",
        make_sharded,
        functools.partial(parse_model, "."),
        ("*.index.json", "*"),
        share=3,
    ),
    Target("own-folder", make_own, functools.partial(parse_model, "m"), OWN, share=4),
    Target("own-sparse", make_sparse, parse_sparse, SPARSE, share=4),
    Target("tokenizer", make_tokenizers, parse_tokenizer, share=10),
    Target("gguf-tokenizer", make_gguf_tokenizer, parse_gguf_tokenizer, share=5),
    Target(
        "template", make_template, parse_template, ("*.jinja",), share=3, mutate=mutate_template
    ),
)
