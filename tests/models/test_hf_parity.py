"""Every family equals the torch reference on random two-layer models, in float32.

Models are made in code; norms and biases are randomised too, since ones and zeros would hide a
missing or swapped one. Parameters go from the reference's state dictionary through the sources.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.models import stack
from jaxinfer.models.params import abstract_params
from jaxinfer.models.registry import config_from_hf, family_for
from jaxinfer.testing.quick import quick_jit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

forward = quick_jit(stack.forward)
SMALL = {
    "vocab_size": 131,  # odd on purpose
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
OPT = {key: value for key, value in SMALL.items() if key != "intermediate_size"} | {"ffn_dim": 88}
FALCON = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
MPT = {"vocab_size": 131, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama, grouped queries": ("Llama", SMALL | {"num_key_value_heads": 2}),
    "llama, one key head": ("Llama", SMALL | {"num_key_value_heads": 1}),
    "llama, all key heads, tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("Llama", SMALL | {"head_dim": 16, "rms_norm_eps": 1e-3}),
    "llama, linear": (
        "Llama",
        SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "llama, llama3": ("Llama", SMALL | {"rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", SMALL | {"rope_parameters": YARN}),
    "llama, yarn without truncation": (
        "Llama",
        SMALL
        | {
            "head_dim": 32,
            "rope_parameters": YARN
            | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 8.0},
        },
    ),
    "mistral, window": (
        "Mistral",
        SMALL | {"num_key_value_heads": 2, "sliding_window": 5, "hidden_act": "gelu"},
    ),
    "mistral, no window": ("Mistral", SMALL | {"num_key_value_heads": 3, "sliding_window": None}),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2, sliding from layer 1": (
        "Qwen2",
        SMALL
        | {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, sliding, biases": (
        "Qwen3",
        SMALL
        | {
            "num_key_value_heads": 2,
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "opt": ("OPT", OPT),
    "opt, no biases, untied": ("OPT", OPT | {"enable_bias": False, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", GPT2),
    "gpt2, unscaled, gelu": (
        "GPT2",
        GPT2 | {"scale_attn_weights": False, "activation_function": "gelu", "n_inner": 40},
    ),
    "neox, parallel, quarter": (
        "GPTNeoX",
        SMALL
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        | {"num_attention_heads": 3},
    ),
    "neox, sequential, full": (
        "GPTNeoX",
        SMALL
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "falcon 7b": ("Falcon", FALCON),
    "falcon 40b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": (
        "Falcon",
        FALCON
        | {
            "new_decoder_architecture": True,
            "num_kv_heads": 3,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
            "ffn_hidden_size": 40,
        },
    ),
    "falcon rw": (
        "Falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("Mpt", MPT),
    "mpt, clipped, scaled": (
        "Mpt",
        MPT
        | {
            "n_heads": 3,
            "attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.3},
        },
    ),
}


def reference(name: str):
    """The case's torch model with every parameter random, and its config.json as a dictionary."""
    kind, options = CASES[name]
    # The reference's eager Falcon adds ALiBi twice; sdpa, its default, does not.
    attention = "sdpa" if options.get("alibi") else "eager"
    hf = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation=attention).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (path.endswith("weight")))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model, json.loads(json.dumps(hf.to_dict()))


def params_of(cfg: ModelConfig, tensors: dict[str, np.ndarray], dtype=np.float32):
    """The parameter tree from checkpoint tensors, through the family's sources."""
    family = family_for(cfg.family)
    sources = family.sources(cfg)

    def leaf(path, shape):
        key = tuple(getattr(entry, "key", getattr(entry, "idx", None)) for entry in path)
        source = sources.pop(key)
        array = source.transform(tensors[family.locate(source, tensors)].astype(dtype))
        assert array.shape == shape.shape, (key, array.shape, shape.shape)
        return jnp.asarray(array)

    params = jax.tree_util.tree_map_with_path(leaf, abstract_params(cfg, dtype))
    assert not sources, f"sources without a parameter: {sorted(map(str, sources))}"
    return params


def tensors_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def random_tokens(vocab_size: int, size: int = 21) -> np.ndarray:
    # Token 1 is OPT's padding, whose embedding the reference treats apart: leave it out.
    return np.random.default_rng(0).integers(2, vocab_size, (2, size))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(name):
    model, hf = reference(name)
    cfg = config_from_hf(hf)
    tokens = random_tokens(cfg.vocab_size)
    expected = logits_of(model, tokens)
    params = params_of(cfg, tensors_of(model))
    got = np.asarray(forward(cfg, params, jnp.asarray(tokens, jnp.int32)).logits)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_mpt_honours_alibi_bias_max_which_the_reference_model_leaves_at_8():
    model, hf = reference("mpt")
    cfg = config_from_hf(hf | {"attn_config": {"alibi_bias_max": 4}})
    build = model.transformer.build_mpt_alibi_tensor
    model.transformer.build_mpt_alibi_tensor = partial(build, alibi_bias_max=4)
    tokens = random_tokens(cfg.vocab_size)
    expected = logits_of(model, tokens)
    params = params_of(cfg, tensors_of(model))
    got = np.asarray(forward(cfg, params, jnp.asarray(tokens, jnp.int32)).logits)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    "name",
    ["llama, grouped queries", "falcon 40b", "gpt2", "mpt", "opt", "neox, sequential, full"],
)
def test_bfloat16_logits_stay_near_the_float32_reference(name):
    model, hf = reference(name)
    cfg = config_from_hf(hf)
    tokens = random_tokens(cfg.vocab_size)
    expected = logits_of(model, tokens)
    params = params_of(cfg, tensors_of(model), jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    got = np.asarray(forward(cfg, params, jnp.asarray(tokens, jnp.int32)).logits)
    assert got.dtype == np.float32
    # 8 bits of mantissa through two layers: a few per cent of the scale (measured 1 to 2 %).
    assert np.abs(got - expected).max() < 0.06 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama, grouped queries", "falcon 7b", "opt", "gpt2"])
def test_tensor_names_without_the_body_prefix_load_too(name):
    model, hf = reference(name)
    cfg = config_from_hf(hf)
    prefix = family_for(cfg.family).prefixes[0]
    tensors = tensors_of(model)
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    same = jax.tree.map(np.array_equal, params_of(cfg, tensors), params_of(cfg, bare))
    assert jax.tree.all(same)


def test_a_pythia_checkpoint_from_before_transformers_5_names_its_head_embed_out():
    model, hf = reference("neox, parallel, quarter")
    cfg = config_from_hf(hf)
    tensors = tensors_of(model)
    old = {key.replace("lm_head", "embed_out"): value for key, value in tensors.items()}
    head = params_of(cfg, old)["head"]["weight"]
    assert np.array_equal(head, tensors["lm_head.weight"])
