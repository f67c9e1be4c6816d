"""StripedHyena's layout: a random checkpoint against a forward pass in NumPy that knows nothing of
ours, and back to the same bits."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxinfer as ji
from jaxinfer.io.stripedhyena import save_stripedhyena
from jaxinfer.nn.modal import modal_filter
from tests.distill.filter_banks import sums_of_modes

D, HEADS, GROUPS, INNER, MODES, VOCAB, LAYERS = 24, 4, 2, 40, 3, 50, 3
CONFIG = {
    "model_type": "stripedhyena", "vocab_size": VOCAB, "hidden_size": D, "num_filters": D,
    "num_layers": LAYERS, "attn_layer_idxs": [1], "hyena_layer_idxs": [0, 2, 3],
    "num_attention_heads": HEADS, "proj_groups": GROUPS, "inner_mlp_size": INNER,
    "state_size": MODES, "short_filter_length": 3, "short_filter_bias": True, "eps": 0.05,
    "rotary_emb_base": 500.0, "max_seqlen": 64, "hyena_filter_groups": 1,
    "column_split_hyena": True, "qkv_proj_bias": True, "mha_out_proj_bias": False,
    "tie_embeddings": False, "final_norm": True, "eos_token_id": 2,
}  # fmt: skip


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    found = {"embedding_layer.weight": 3 * drawn(VOCAB, D), "unembed.weight": 5 * drawn(VOCAB, D)}
    found["norm.scale"] = 1 + drawn(D)
    keys = D // GROUPS
    for i in range(LAYERS):
        name = f"blocks.{i}"
        found |= {f"{name}.{x}_norm.scale": 1 + drawn(D) for x in ("pre", "post")}
        found |= {f"{name}.mlp.{x}.weight": 2 * drawn(INNER, D) for x in ("l1", "l2")}
        found[f"{name}.mlp.l3.weight"] = drawn(D, INNER)
        if i in CONFIG["attn_layer_idxs"]:
            inner = f"{name}.inner_mha_cls"
            found[f"{inner}.Wqkv.weight"] = 2 * drawn(D + 2 * keys, D)
            found[f"{inner}.Wqkv.bias"] = drawn(D + 2 * keys)
            found[f"{inner}.out_proj.weight"] = drawn(D, D)
            found[f"{inner}.rotary_emb.inv_freq"] = drawn(D // HEADS // 2)
            continue
        for part, rows in (("projections", 3 * D), ("out_filter_dense", D)):
            found[f"{name}.{part}.weight"] = 2 * drawn(rows, D)
            found[f"{name}.{part}.bias"] = drawn(rows)
        poles, residues, _ = sums_of_modes(D, MODES, 4, seed=i)
        for part, values in (("poles", poles), ("residues", residues / MODES)):
            pair = np.stack([values.real, values.imag], axis=-1)[:, :, None]
            found[f"{name}.filter.{part}"] = pair.astype(np.float32)
        found[f"{name}.filter.D"] = drawn(D)
        found[f"{name}.filter.short_filter_weight"] = drawn(3 * D, 1, 3)
        found[f"{name}.filter.short_filter_bias"] = drawn(3 * D)
    return found


def expected_logits(w: dict[str, np.ndarray], config: dict, tokens: np.ndarray) -> np.ndarray:
    """In float64, of one text."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    size, head = len(tokens), D // HEADS

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + config["eps"]) * scale

    def hyena(name: str, u: np.ndarray) -> np.ndarray:
        z = u @ w[f"{name}.projections.weight"].T + w[f"{name}.projections.bias"]
        taps, own = w[f"{name}.filter.short_filter_weight"][:, 0], f"{name}.filter"
        short = np.zeros_like(z) + w[f"{own}.short_filter_bias"]
        for back in range(3):
            short[back:] += taps[:, 2 - back] * z[: size - back]
        if config["column_split_hyena"]:
            parts = short.reshape(size, HEADS, 3, head)
            x2, x1, v = (parts[:, :, i].reshape(size, D) for i in range(3))
        else:
            x2, x1, v = np.split(short, 3, axis=-1)
        poles, residues = (
            w[f"{own}.{x}"][..., 0, 0] + 1j * w[f"{own}.{x}"][..., 0, 1]
            for x in ("poles", "residues")
        )
        gated, out = x1 * v, np.zeros_like(v)
        state = np.zeros((D, MODES), complex)
        for t in range(size):  # the state first, then the output
            state = poles * state + gated[t][:, None]
            out[t] = (residues * state).real.sum(axis=1) + w[f"{own}.D"] * gated[t]
        y = x2 * out
        return y @ w[f"{name}.out_filter_dense.weight"].T + w[f"{name}.out_filter_dense.bias"]

    def attention(name: str, u: np.ndarray) -> np.ndarray:
        qkv = u @ w[f"{name}.Wqkv.weight"].T + w[f"{name}.Wqkv.bias"]
        q, k, v = (x.reshape(size, -1, head) for x in np.split(qkv, [D, D + D // GROUPS], axis=-1))
        speeds = config["rotary_emb_base"] ** (-np.arange(0, head, 2) / head)
        angle = np.arange(size)[:, None] * speeds / config.get("rotary_emb_scaling_factor", 1)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def turned(x: np.ndarray) -> np.ndarray:
            first, second = np.split(x, 2, axis=-1)
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

        k, v = (np.repeat(x, GROUPS, axis=1) for x in (turned(k), v))
        scores = np.einsum("thd,shd->hts", turned(q), k) / np.sqrt(head)
        scores = np.where(np.tri(size, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        found = np.einsum("hts,shd->thd", weights, v).reshape(size, D)
        return found @ w[f"{name}.out_proj.weight"].T

    x = w["embedding_layer.weight"][tokens]
    for i in range(LAYERS):
        name = f"blocks.{i}"
        u = norm(x, w[f"{name}.pre_norm.scale"])
        is_attention = i in config["attn_layer_idxs"]
        x = x + (attention(f"{name}.inner_mha_cls", u) if is_attention else hyena(name, u))
        u = norm(x, w[f"{name}.post_norm.scale"])
        gate, up = (u @ w[f"{name}.mlp.{part}.weight"].T for part in ("l1", "l2"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.mlp.l3.weight"].T
    return norm(x, w["norm.scale"]) @ w["unembed.weight"].T


def folder_of(path, config: dict, weights: dict[str, np.ndarray], prefix: str = "backbone."):
    path.mkdir()
    save_file({f"{prefix}{name}": x for name, x in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


SETTINGS = {
    "heads, SH-7B": {},
    "side by side, interpolated": {
        "column_split_hyena": False,
        "use_interpolated_rotary_pos_emb": True,
        "rotary_emb_scaling_factor": 8.0,
    },
}


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_a_plain_forward_and_tensors_come_back(name, tmp_path):
    config, weights = CONFIG | SETTINGS[name], tensors()
    lm = ji.load(folder_of(tmp_path / "model", config, weights), dtype="float32")
    assert lm.config.mixers == ("hyena", "attn", "hyena")
    tokens = np.random.default_rng(1).integers(0, VOCAB, 20)
    expected = expected_logits(weights, config, tokens)
    found = np.asarray(lm.logits(tokens[None]))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    save_stripedhyena(tmp_path / "out", lm.config, lm.params)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    own = {key: x for key, x in weights.items() if not key.endswith("inv_freq")}
    assert stored.keys() == own.keys()
    for key, x in own.items():
        np.testing.assert_array_equal(stored[key], x, err_msg=key)
    again = ji.load(tmp_path / "out", dtype="float32")
    assert replace(again.config, eos_token_ids=(2,)) == lm.config


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_modes_of_the_delayed_form_are_written_undelayed(tmp_path):
    weights = tensors()
    lm = ji.load(folder_of(tmp_path / "model", CONFIG, weights, ""), dtype="float32")
    layers = list(lm.params["layers"])
    for i in (0, 2):
        poles, residues, _ = sums_of_modes(D, MODES, 4, seed=i + 7)
        made = modal_filter(poles, residues, np.ones(D))
        modal = {x: getattr(made, x) for x in ("nu", "theta", "a", "b", "h0")}
        layers[i] = layers[i] | {"hyena": layers[i]["hyena"] | {"modal": modal}}
    hyena = replace(lm.config.hyena, modes=(MODES, 0, MODES))
    distilled = ji.LM(
        replace(lm.config, hyena=hyena), lm.params | {"layers": tuple(layers)}, name="distilled"
    )
    save_stripedhyena(tmp_path / "out", distilled.config, distilled.params)
    again, tokens = ji.load(tmp_path / "out", dtype="float32"), np.arange(20)[None]
    expected = np.asarray(distilled.logits(tokens))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(again.logits(tokens), expected, atol=1e-4 * scale)
    assert np.abs(np.asarray(lm.logits(tokens)) - expected).max() > 0.01 * scale
    with pytest.raises(ValueError, match="layout holds models of its own form alone"):
        plain = ji.load("tiny-llama")
        save_stripedhyena(tmp_path / "llama", plain.config, plain.params)
    assert not (tmp_path / "llama").exists()


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"hyena_filter_groups": 2}, {}, "'hyena_filter_groups' 2 is not implemented"),
        ({"num_filters": 8}, {}, "'num_filters' 8 is not the width 24"),
        ({"hyena_layer_idxs": [0]}, {}, "must name each of the 3 layers once"),
        ({"state_size": 4}, {}, "config and checkpoint disagree"),
        ({"proj_groups": 3}, {}, "'proj_groups' 3 must divide the 4 heads"),
        ({}, {"poles": lambda x: x * 1.5}, "poles: .* of 72 poles are not inside the unit circle"),
        ({}, {"poles": lambda x: x.astype(ml_dtypes.bfloat16)}, "poles are bfloat16, and only fl"),
        ({}, {"residues": lambda x: x * np.nan}, "holds non-finite values"),
        ({}, {"short_filter_weight": lambda x: x[:, :, :2]}, "config and checkpoint disagree"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(settings, changes, message, tmp_path):
    weights = {
        name: changes.get(name.rpartition(".")[2], lambda x: x)(x) for name, x in tensors().items()
    }
    folder = folder_of(tmp_path / "model", CONFIG | settings, weights)
    with pytest.raises(ValueError, match=message) as raised:
        ji.load(folder, dtype="float32")
    assert "\n" not in str(raised.value)
