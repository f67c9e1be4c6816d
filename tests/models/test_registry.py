"""Reading config.json: both spellings, the families' defaults, one-line refusals of the rest."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.models.family import Source
from jaxinfer.models.params import abstract_params
from jaxinfer.models.registry import FAMILIES, config_from_hf, family_for

SIZES = {
    "vocab_size": 32,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}
MINIMAL = {
    "llama": SIZES,
    "mistral": SIZES | {"num_key_value_heads": 1},
    "qwen2": SIZES | {"num_key_value_heads": 1},
    "qwen3": SIZES | {"num_key_value_heads": 1},
    "opt": SIZES | {"ffn_dim": 20},
    "gpt2": {"vocab_size": 32, "n_embd": 12, "n_layer": 2, "n_head": 3},
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
    "falcon": SIZES,
    "mpt": {"vocab_size": 32, "d_model": 12, "n_layers": 2, "n_heads": 3},
    "stripedhyena": {
        "vocab_size": 32,
        "hidden_size": 12,
        "num_layers": 2,
        "num_attention_heads": 3,
        "attn_layer_idxs": [1],
        "hyena_layer_idxs": [0, 2],
        "state_size": 2,
    },
}


def config(kind="llama", **options):
    return config_from_hf({"model_type": kind} | MINIMAL[kind] | options)


def refusal(kind="llama", **options) -> str:
    with pytest.raises(ValueError) as raised:
        config(kind, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_every_family_has_a_minimal_config():
    assert set(MINIMAL) == {kind for family in FAMILIES for kind in family.model_types}


@pytest.mark.parametrize("kind", MINIMAL)
def test_sources_cover_exactly_the_parameters(kind):
    for tied in (True, False):
        cfg = config(kind, tie_word_embeddings=tied)
        sources = family_for(cfg.family).sources(cfg)
        assert set(sources) == set(leaf_paths(abstract_params(cfg)))


@pytest.mark.parametrize("kind", MINIMAL)
def test_a_config_survives_its_own_dictionary(kind):
    cfg = config(kind)
    assert type(cfg).from_dict(cfg.to_dict()) == cfg


def test_an_unknown_model_type_lists_the_known_ones():
    with pytest.raises(ValueError, match="'rwkv' is not implemented; known are .*'llama'"):
        config_from_hf({"model_type": "rwkv"})


@pytest.mark.parametrize("hf", [None, [], "llama", {}, {"model_type": None}])
def test_a_config_without_a_model_type_is_refused(hf):
    with pytest.raises(ValueError, match="model_type"):
        config_from_hf(hf)


@pytest.mark.parametrize("kind", MINIMAL)
def test_a_missing_required_key_is_named(kind):
    for name in ("vocab_size", *list(MINIMAL[kind])[1:4]):
        hf = {"model_type": kind} | {k: v for k, v in MINIMAL[kind].items() if k != name}
        with pytest.raises(ValueError, match=f"'{name}' is missing"):
            config_from_hf(hf)


@pytest.mark.parametrize("value", [0, -3, 12.5, 12.0, "12", True, [12], 10**30])
def test_a_size_that_is_no_positive_integer_is_refused(value):
    assert "'hidden_size' must be an integer from 1" in refusal(hidden_size=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, 0, -1.0, "1e-6"])
def test_a_norm_epsilon_that_is_no_positive_number_is_refused(value):
    assert "'rms_norm_eps'" in refusal(rms_norm_eps=value)


def test_null_stands_for_the_default():
    cfg = config(head_dim=None, num_key_value_heads=None, rope_scaling=None)
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.rope.scaling) == (4, 3, "none")


def test_defaults_of_absent_keys_are_the_familys():
    assert not config("llama").tie_embeddings
    assert config("falcon").tie_embeddings
    assert config("gpt2").intermediate_size == 48
    assert config("qwen3").head_dim == 128
    assert config("mistral").sliding_windows == (4096, 4096)
    assert config("gpt_neox").rope.rotary_dim == 2


def test_old_and_new_rope_spellings_read_alike():
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}
    assert config(rope_parameters=new) == config(**old)


def test_the_rotated_share_is_read_from_both_spellings():
    new = config("gpt_neox", rotary_pct=None, rope_parameters={"partial_rotary_factor": 0.5})
    assert new.rope.rotary_dim == config("gpt_neox", rotary_pct=0.5).rope.rotary_dim == 2


def test_yarns_attention_factor_follows_mscale():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    plain = config(rope_parameters=yarn).rope.attention_factor
    assert plain == pytest.approx(0.1 * np.log(4) + 1)
    equal = config(rope_parameters=yarn | {"mscale": 0.7, "mscale_all_dim": 0.7})
    assert equal.rope.attention_factor == 1
    given = config(rope_parameters=yarn | {"attention_factor": 1.5})
    assert given.rope.attention_factor == 1.5


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts():
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    cfg = config(rope_parameters=yarn, max_position_embeddings=256)
    assert cfg.rope.factor == 4


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", 3, ["yarn"]])
def test_unknown_rope_types_are_refused(kind):
    assert "is not implemented" in refusal(rope_scaling={"type": kind, "factor": 2.0})


def test_rope_scaling_without_a_factor_names_the_key():
    assert "'factor' is missing" in refusal(rope_scaling={"type": "linear"})


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2,)), ([2, 7, 2], (2, 7)), (None, ()), (-1, ()), (99, ())]
)
def test_stop_tokens_may_be_one_many_or_none(value, expected):
    assert config(eos_token_id=value).eos_token_ids == expected


def test_qwen2_slides_only_where_it_says_so():
    assert config("qwen2", sliding_window=4).sliding_windows is None
    on = {"use_sliding_window": True, "sliding_window": 4}
    assert config("qwen2", **on, max_window_layers=1).sliding_windows == (None, 4)
    kinds = ["sliding_attention", "full_attention"]
    assert config("qwen2", **on, layer_types=kinds).sliding_windows == (4, None)


def test_layer_types_that_disagree_with_the_window_are_refused():
    kinds = ["sliding_attention", "full_attention"]
    assert "'sliding_window' is off" in refusal("qwen2", layer_types=kinds)
    assert "'layer_types' has 1 entries for 2" in refusal("qwen2", layer_types=kinds[1:])
    assert "'layer_types' must list" in refusal("qwen2", layer_types=["chunked", 1])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config' is set"),
        ("llama", {"num_local_experts": 8}, "mixture-of-experts"),
        ("llama", {"hidden_act": "mish"}, "'hidden_act' is 'mish'; implemented are"),
        ("llama", {"num_key_value_heads": 2}, "multiple of num_kv_heads"),
        ("llama", {"num_attention_heads": 5}, "12 is not a multiple of 5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial rotation"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "must all be 'sliding_attention'"),
        ("opt", {"do_layer_norm_before": False}, "OPT-350m"),
        ("opt", {"word_embed_proj_dim": 6}, "'word_embed_proj_dim' 6 differs"),
        ("opt", {"layer_norm_elementwise_affine": False}, "without parameters"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "is not implemented"),
        ("gpt_neox", {"rotary_pct": 0.25}, "rotary_dim must be even and positive, got 1"),
        ("gpt_neox", {"rotary_pct": 2.0}, "must lie in"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "is not defined for this architecture"),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "multihead"),
        ("mpt", {"attn_config": {"alibi": False}}, "ALiBi"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "'qk_ln' is not implemented"),
        ("mpt", {"attn_config": {"clip_qkv": -1}}, "'clip_qkv' must not be negative"),
        ("mpt", {"no_bias": False}, "'no_bias'"),
        ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "'logit_scale'"),
        ("mpt", {"attn_config": 3}, "expected a dictionary"),
    ],
)
def test_what_is_not_implemented_is_refused(kind, options, message):
    assert message in refusal(kind, **options)


def test_a_missing_tensor_is_named_with_the_spellings_tried():
    family = family_for("gpt_neox")
    with pytest.raises(ValueError, match="lacks tensor 'gpt_neox.embed_in.weight'.*'embed_in"):
        family.locate(Source("embed_in.weight"), {"other"})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fused_rows_split_interleaved_heads(dtype):
    cfg = config("falcon", new_decoder_architecture=True, num_kv_heads=1, bias=True)
    sources = family_for("falcon").sources(cfg)
    rows = np.repeat(np.arange(5), 4)  # three query heads, a key head, a value head
    weight = np.tile(rows[:, None], (1, 12)).astype(dtype)
    at = ("layers", 0, "attn")
    for part, heads in {"q": [0, 1, 2], "k": [3], "v": [4]}.items():
        own = sources[*at, part, "weight"].transform(weight)
        assert own.dtype == dtype
        assert own.shape == (4 * len(heads), 12)
        assert own[:, 0].tolist() == np.repeat(heads, 4).tolist()
        bias = sources[*at, part, "bias"].transform(rows.astype(dtype))
        assert bias.tolist() == np.repeat(heads, 4).tolist()


def test_a_fused_tensor_of_another_size_is_refused():
    source = family_for("falcon").sources(config("falcon"))["layers", 0, "attn", "q", "weight"]
    with pytest.raises(ValueError, match=r"shape \(7, 12\) does not split"):
        source.transform(np.zeros((7, 12), np.float32))


OPTIONAL_KEYS = """
    head_dim num_key_value_heads hidden_act rms_norm_eps layer_norm_epsilon layer_norm_eps bias
    rope_parameters rope_scaling rope_theta partial_rotary_factor sliding_window layer_types
    use_sliding_window max_window_layers tie_word_embeddings bos_token_id eos_token_id n_inner
    max_position_embeddings attn_config expansion_ratio max_seq_len alibi n_positions activation
    new_decoder_architecture num_kv_heads num_ln_in_parallel_attn ffn_hidden_size multi_query
    word_embed_proj_dim quantization_config num_experts attention_bias norm_type
    original_max_position_embeddings
"""
NESTED_KEYS = """
    rope_type type factor rope_theta original_max_position_embeddings attention_factor mscale
    mscale_all_dim beta_fast beta_slow low_freq_factor high_freq_factor truncate clip_qkv
    alibi_bias_max softmax_scale partial_rotary_factor
"""
KEYS = sorted({key for minimal in MINIMAL.values() for key in minimal} | {*OPTIONAL_KEYS.split()})
NUMBERS = (
    st.integers(-3, 70)
    | st.sampled_from([10**9, 10**30, -(10**400), 10**400, 2**31 - 1])
    | st.floats()
)
SCALARS = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.sampled_from(["llama3", "yarn", "linear", "default", "gelu", "full_attention", "", "é"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NESTED_KEYS.split()), inner | NUMBERS, max_size=6)
    ),
    max_leaves=10,
)


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(sorted(MINIMAL)),
    changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), JSON, max_size=5),
    missing=st.sets(st.sampled_from(KEYS), max_size=1),
)
def test_arbitrary_json_gives_a_config_or_a_value_error(kind, changes, missing):
    hf = {"model_type": kind} | MINIMAL[kind] | changes
    hf = {key: value for key, value in hf.items() if key not in missing}
    try:
        cfg = config_from_hf(hf)
    except ValueError as error:
        assert str(error)
        assert "\n" not in str(error)
    else:
        assert hash(cfg) is not None


@settings(max_examples=100, deadline=None)
@given(
    hf=JSON
    | st.dictionaries(st.text(max_size=12), JSON)
    | st.fixed_dictionaries({"model_type": JSON})
)
def test_arbitrary_top_level_json_never_raises_anything_else(hf):
    with pytest.raises(ValueError):
        config_from_hf(hf)


def leaf_paths(tree, path=()):
    """Paths of all leaves as tuples of keys and indices."""
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaf_paths(tree[key], (*path, key))]
    if isinstance(tree, tuple):
        return [leaf for i, item in enumerate(tree) for leaf in leaf_paths(item, (*path, i))]
    return [path]
