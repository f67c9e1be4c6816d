"""GGUF files equal the Hugging Face folders they were made from: weights, config, tokenizer."""

import gguf
import jax
import numpy as np
import pytest
from test_safetensors import same
from tiny_checkpoints import CONFIG, finish, gguf_file, gguf_writer, hf_folder, tensors

from jaxinfer.io.gguf import GGUFFile
from jaxinfer.io.gguf_config import hf_config
from jaxinfer.io.gguf_tokenizer import tokenizer_from_metadata
from jaxinfer.io.load import load_checkpoint
from jaxinfer.models.registry import config_from_hf

Q = gguf.GGMLQuantizationType
SMALL = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}


def test_a_gguf_file_equals_the_folder_it_was_made_from(tmp_path):
    left = load_checkpoint(gguf_file(tmp_path / "m.gguf"), "float32")
    right = load_checkpoint(hf_folder(tmp_path / "m"), "float32")
    same(left.params, right.params)
    assert left.config == right.config


def test_without_an_output_tensor_the_head_is_tied(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    checkpoint = load_checkpoint(gguf_file(tmp_path / "m.gguf", config), "float32")
    assert checkpoint.config.tie_embeddings and "head" not in checkpoint.params


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0])
def test_quantized_rows_are_dequantized_and_rotary_rows_restored(tmp_path, kind):
    params = load_checkpoint(gguf_file(tmp_path / "m.gguf", kind=kind), "float32").params
    weight = tensors()["model.layers.0.self_attn.k_proj.weight"]
    # rows are quantized one by one, so their order does not matter to the values
    expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
    np.testing.assert_allclose(params["layers"][0]["attn"]["k"]["weight"], expected, atol=1e-6)


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_XS, Q.IQ2_S])
def test_every_type_that_gguf_dequantizes_is_read(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((4, size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    finish(writer)
    value = GGUFFile(tmp_path / "m.gguf").raw("token_embd.weight")
    assert value.shape == (4, block) and value.dtype == np.float32
    np.testing.assert_array_equal(value, gguf.dequantize(data, kind))


def _llama_rows(name, value, cfg):
    from tiny_checkpoints import interleave

    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f"{part}.weight" in name:
            return interleave(value, getattr(cfg, heads))
    return value


def _gpt2_rows(name, value, cfg):
    return value.T.copy() if value.ndim == 2 and ".h." in name else value


def _sorted_runs(value, groups, queries, width):
    """Rows (queries, key, value) of each group, sorted into all queries, all keys, all values."""
    runs = value.reshape(groups, queries + 2, width, *value.shape[1:])
    parts = (runs[:, :queries], runs[:, queries : queries + 1], runs[:, queries + 1 :])
    return np.concatenate([part.reshape(-1, *value.shape[1:]) for part in parts])


def _neox_rows(name, value, cfg):
    heads = cfg.num_attention_heads
    is_fused = "query_key_value" in name
    return _sorted_runs(value, heads, 1, cfg.hidden_size // heads) if is_fused else value


def _falcon_rows(name, value, cfg):
    groups = cfg.num_kv_heads if cfg.new_decoder_architecture else 1
    queries = cfg.num_attention_heads // groups
    width = cfg.hidden_size // cfg.num_attention_heads
    return _sorted_runs(value, groups, queries, width) if "query_key_value" in name else value


def _unchanged(name, value, cfg):
    return value


FALCON = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
ARCHITECTURES = {
    "llama": ("Llama", SMALL | {"num_key_value_heads": 2}, _llama_rows),
    "llama with biases": (
        "Llama",
        SMALL | {"num_key_value_heads": 2, "mlp_bias": True},
        _llama_rows,
    ),
    "mistral": (
        "Mistral",
        SMALL | {"num_key_value_heads": 2, "sliding_window": 8},
        _llama_rows,
    ),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 2}, _unchanged),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 16}, _unchanged),
    "gpt2": (
        "GPT2",
        {"vocab_size": 131, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64},
        _gpt2_rows,
    ),
    "gptneox": ("GPTNeoX", SMALL | {"rotary_pct": 0.5}, _neox_rows),
    "falcon": ("Falcon", FALCON | {"multi_query": True, "parallel_attn": True}, _falcon_rows),
    "falcon, grouped": (
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        _falcon_rows,
    ),
    "falcon, grouped under one norm": (  # Falcon2-11B
        "Falcon",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        _falcon_rows,
    ),
    "mpt": (
        "Mpt",
        {"vocab_size": 131, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64},
        _unchanged,
    ),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_each_architecture_equals_its_hugging_face_folder(tmp_path, case):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, options, rows = ARCHITECTURES[case]
    hf = getattr(transformers, f"{name}Config")(**options)
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, head)(hf)
    model.save_pretrained(tmp_path / "hf")
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    generator = np.random.default_rng(0)
    state = {
        key: value + generator.standard_normal(value.shape, np.float32) * 0.1
        for key, value in state.items()
    }
    if hf.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    from safetensors.numpy import save_file

    save_file(state, tmp_path / "hf" / "model.safetensors")
    arch = {"llama with biases": "llama", "mistral": "llama"}
    write_architecture(tmp_path / "m.gguf", arch.get(case, case.split(",")[0]), hf, state, rows)
    with pytest.warns(UserWarning, match="no tokenizer"):
        left = load_checkpoint(tmp_path / "m.gguf", "float32")
        right = load_checkpoint(tmp_path / "hf", "float32")
    same(left.params, right.params)
    ids = {"bos_token_id": None, "eos_token_ids": ()}
    plain = {**left.config.to_dict(), **ids} == {**right.config.to_dict(), **ids}
    assert plain, (left.config, right.config)


def write_architecture(path, arch, hf, state, rows):
    writer = gguf.GGUFWriter(path, arch)
    get = lambda *names: next(getattr(hf, n) for n in names if getattr(hf, n, None))  # noqa: E731
    width, heads = get("hidden_size", "d_model", "n_embd"), get("num_attention_heads", "n_heads")
    layers = get("num_hidden_layers", "n_layers", "n_layer")
    writer.add_block_count(layers)
    writer.add_context_length(get("max_position_embeddings", "max_seq_len", "n_positions"))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(getattr(hf, "intermediate_size", None) or 4 * width)
    writer.add_head_count(heads)
    kv_heads = getattr(hf, "num_key_value_heads", None)
    if arch == "falcon":
        kv_heads = hf.num_kv_heads if hf.new_decoder_architecture else 1
    if kv_heads:
        writer.add_head_count_kv(kv_heads)
    if hasattr(hf, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
        head = getattr(hf, "head_dim", None) or width // heads
        writer.add_key_length(head)
        writer.add_value_length(head)
    else:
        writer.add_layer_norm_eps(
            next(getattr(hf, n) for n in ("layer_norm_eps", "layer_norm_epsilon") if hasattr(hf, n))
        )
    if getattr(hf, "sliding_window", None) and hf.model_type == "mistral":
        writer.add_sliding_window(hf.sliding_window)
    if arch == "gptneox":
        writer.add_rope_dimension_count(int(width // heads * 0.5))
        writer.add_parallel_residual(True)
    if arch == "mpt":
        writer.add_max_alibi_bias(float(hf.attn_config.alibi_bias_max))
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], layers)
    for name, value in state.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is not None:
            writer.add_tensor(target, np.ascontiguousarray(rows(name, value, hf)))
    finish(writer)


def test_llama3_scaling_is_recognised_from_its_divisors(tmp_path):
    writer = gguf_writer(tmp_path / "m.gguf", CONFIG | {"rope_theta": 500000.0})
    wave = 2 * np.pi * 500000.0 ** (np.arange(4) / 4)
    blend = np.clip((8192 / wave - 1) / 3, 0, 1)
    writer.add_tensor("rope_freqs.weight", (1 / ((1 - blend) / 32 + blend)).astype(np.float32))
    finish(writer)
    rope = load_checkpoint(tmp_path / "m.gguf", "float32").config.rope
    assert rope is not None
    assert (rope.scaling, rope.factor, rope.original_max_positions) == ("llama3", 32.0, 8192)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"scale_linear": 4.0}, ("linear", 4.0)),
        ({"scaling.factor": 4.0}, ("linear", 4.0)),
        ({"scaling.type": "linear", "scaling.factor": 4.0, "scale_linear": 8.0}, ("linear", 4.0)),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, ("yarn", 4.0)),
        ({"scaling.type": "none", "scaling.factor": 4.0}, ("none", 1.0)),
        ({"scale_linear": 1.0}, ("none", 1.0)),
        ({"scaling.attn_factor": 1.0}, ("none", 1.0)),
    ],
)
def test_rope_scaling_is_read_with_the_defaults_of_llama_cpp(tmp_path, keys, expected):
    writer = gguf_writer(tmp_path / "m.gguf")
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.rope.{key}", value)
    finish(writer)
    rope = GGUFFile(tmp_path / "m.gguf").config.rope
    assert rope is not None and (rope.scaling, rope.factor) == expected


def test_the_whole_yarn_of_a_gguf_file_is_read(tmp_path):
    writer = gguf_writer(tmp_path / "m.gguf")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)
    writer.add_rope_scaling_yarn_beta_fast(16.0)
    writer.add_rope_scaling_yarn_beta_slow(2.0)
    finish(writer)
    rope = GGUFFile(tmp_path / "m.gguf").config.rope
    assert rope is not None
    assert (rope.original_max_positions, rope.beta_fast, rope.beta_slow) == (16, 16.0, 2.0)
    assert rope.attention_factor == pytest.approx(0.1 * np.log(4) + 1)


def test_tensors_that_no_parameter_uses_are_named_in_a_warning(tmp_path):
    writer = gguf_writer(tmp_path / "m.gguf")
    writer.add_tensor("blk.0.attn_output.bias", np.ones(32, np.float32))
    finish(writer)
    with pytest.warns(UserWarning, match=r"1 tensors are not part .* blk\.0\.attn_output\.bias"):
        load_checkpoint(tmp_path / "m.gguf", "float32")


def test_the_tokenizer_of_a_gguf_file_splits_digits_and_knows_special_tokens(tmp_path):
    tokenizer = load_checkpoint(gguf_file(tmp_path / "m.gguf"), "float32").tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("a 12é</s>")
    assert ids[-1] == 258 and tokenizer.decode(ids) == "a 12é"
    assert tokenizer.bos_token_id == 257 and tokenizer.eos_token_ids == (258,)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]).startswith("<s>[user]")


@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("llama-bpe", "it's 12345 ok", ["it", "'s", "Ġ", "123", "45", "Ġok"]),
        ("qwen2", "it's 123\n\nok", ["it", "'s", "Ġ", "1", "2", "3", "ĊĊ", "ok"]),
        ("gpt-2", "it's 123 ok", ["it", "'s", "Ġ123", "Ġok"]),
        ("smollm", "it's 12 ok", ["it", "'s", "Ġ", "1", "2", "Ġok"]),
    ],
)
def test_each_pre_tokenizer_splits_as_its_model_was_trained(pre, text, pieces):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": [],
    }
    tokenizer = tokenizer_from_metadata(metadata, "m")
    assert tokenizer is not None
    split = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in split] == pieces


def test_a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes():
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "a", "b", "c", "ab", "bc", "▁ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = tokenizer_from_metadata(metadata, "m")
    assert tokenizer is not None
    ids = tokenizer.encode("abc ab é")
    tokens = [tokenizer.backend.id_to_token(number) for number in ids]
    assert tokens == ["<s>", "▁", "a", "bc", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "abc ab é"


@pytest.mark.parametrize("key, value", [("pre", "mystery"), ("model", "bert")])
def test_an_unknown_tokenizer_warns_instead_of_guessing(key, value):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a"],
        f"tokenizer.ggml.{key}": value,
    }
    with pytest.warns(UserWarning, match=f"{value}' is not supported"):
        assert tokenizer_from_metadata(metadata, "m") is None


def test_smollm2_gives_the_known_token_ids(tmp_path):
    from jaxinfer.files import cache_folder
    from jaxinfer.io.checkpoint import is_checkpoint
    from jaxinfer.io.tokenizer import Tokenizer

    folder = cache_folder() / "models" / "smollm2-135m"
    if not is_checkpoint(folder):
        pytest.skip("SmolLM2 is not in the cache")
    tokenizer = Tokenizer.load(folder)
    text = "In 1989, 12 cats'\n  sat\ton <|im_start|>mats é"
    assert tokenizer.encode(text) == SMOLLM2_IDS
    assert tokenizer.decode(SMOLLM2_IDS, skip_special=False) == text
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_ids[0] == 2


SMOLLM2_IDS = [
    788,
    216,
    33,
    41,
    40,
    41,
    28,
    216,
    33,
    34,
    7680,
    23,
    3805,
    2643,
    197,
    258,
    216,
    1,
    93,
    1457,
    26411,
]


def test_closing_a_file_leaves_loaded_parameters_alive(tmp_path):
    params = load_checkpoint(gguf_file(tmp_path / "m.gguf"), "float32").params
    (tmp_path / "m.gguf").unlink()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("value", [-1, 2**31, 1.5, float("nan"), "x", True, [1, 2], ["a"], []])
def test_metadata_of_a_wrong_type_is_refused_or_harmless(tmp_path, value):
    good = GGUFFile(gguf_file(tmp_path / "m.gguf"))
    shapes = {name: tensor.shape for name, tensor in good.tensors.items()}
    for key in good.metadata:
        metadata = good.metadata | {key: value}
        try:
            config_from_hf(hf_config(metadata, shapes, None, "m.gguf"))
            tokenizer_from_metadata(metadata, "m.gguf")
        except ValueError as error:
            assert "\n" not in str(error)
