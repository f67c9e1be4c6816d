"""Tiny checkpoints made in code: a two-layer Llama as a Hugging Face folder and as a GGUF file."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def vocabulary() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + SPECIAL


def backend() -> tokenizers.Tokenizer:
    """A byte-level tokenizer of 256 bytes and four special tokens."""
    vocab = {token: number for number, token in enumerate(vocabulary())}
    result = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    result.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = tokenizers.decoders.ByteLevel()
    result.add_special_tokens(SPECIAL)
    return result


def tensors(config: dict = CONFIG, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's Llama names."""
    generator = np.random.default_rng(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.self_attn.q_proj.weight": (width, width),
            f"{layer}.self_attn.k_proj.weight": (keys, width),
            f"{layer}.self_attn.v_proj.weight": (keys, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.post_attention_layernorm.weight": (width,),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
        }
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return {
        name: generator.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in shapes.items()
    }


def hf_folder(
    folder: Path, config: dict = CONFIG, weights: dict | None = None, tokenizer: bool = True
) -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, folder / "model.safetensors")
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    backend().save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def sharded_folder(folder: Path, config: dict = CONFIG) -> Path:
    """The same folder with two shards and an index."""
    weights = tensors(config)
    hf_folder(folder, config, weights)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    half = len(names) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rotary rows as llama.cpp's converter stores them: pairs next to each other."""
    split = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.stack([split[:, 0], split[:, 1]], axis=2).reshape(rows.shape)


def gguf_writer(path: Path, config: dict = CONFIG, kind=gguf.GGMLQuantizationType.F32):
    """A writer filled with model and tokenizer; the caller may add more and must `finish` it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_token_merges([])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_unk_token_id(256)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, value in tensors(config).items():
        if "q_proj" in name:
            value = interleave(value, config["num_attention_heads"])
        if "k_proj" in name:
            value = interleave(value, config["num_key_value_heads"])
        stored = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(value, stored)
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, data, raw_dtype=stored)
    return writer


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file(path: Path, config: dict = CONFIG, kind=gguf.GGMLQuantizationType.F32) -> Path:
    writer = gguf_writer(path, config, kind)
    finish(writer)
    return path


def raw_safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None):
    """A safetensors file with any header; `length` forges the announced header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
