"""Measures of a whole model: attention and activations of Hugging Face, ranks of NumPy."""

import numpy as np
import pytest

from jaxinfer.lm import LM
from jaxinfer.models.registry import config_from_hf
from jaxinfer.theory.measures.activity import activity_overlap, sparsity
from jaxinfer.theory.measures.model import PER_HEAD, measure_model
from tests.factories import lm_of, random_tokens
from tests.models import hyena_models


def by_hand(weights):
    """The measures of heads, of attention [Q, N, T, T] and in plain NumPy."""
    size = weights.shape[-1]
    rows = np.zeros((3, *weights.shape[:3]))
    for index in np.ndindex(weights.shape[:3]):
        p = weights[index][: index[2] + 1].astype(float)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
        rows[0][index] = entropy / np.log(len(p)) if len(p) > 1 else 0
        rows[1][index] = p[:4].sum()
        rows[2][index] = np.sort(p)[-16:].sum()
    half = size // 2
    overlap = np.zeros(weights.shape[:2])
    for index in np.ndindex(overlap.shape):
        mass = [
            weights[index][part, :half].sum(axis=0) for part in (slice(half), slice(half, size))
        ]
        first, second = (set(np.argsort(-x)[: max(1, round(0.1 * half))]) for x in mass)
        overlap[index] = len(first & second) / len(first)
    means = rows.mean(axis=(1, 3))
    found = dict(zip(("relative_entropy", "sink_mass", "top_mass"), means, strict=True))
    return found | {"heavy_hitter_overlap": overlap.mean(axis=0)}


@pytest.mark.parametrize("name", ["llama, grouped queries", "mpt", "opt"])
def test_measures_are_those_of_the_attention_of_hugging_face(name):
    torch = pytest.importorskip("torch")
    from tests.models import test_hf_parity as hf

    model, config = hf.reference(name)
    cfg = config_from_hf(config)
    tokens = hf.random_tokens(cfg.vocab_size)
    with torch.no_grad():
        attention = model(torch.from_numpy(tokens), output_attentions=True).attentions
    params = hf.params_of(cfg, hf.tensors_of(model))
    found = measure_model(LM(cfg, params), tokens, block=8)
    for layer, weights in enumerate(attention):
        for measure, expected in by_hand(weights.numpy()).items():
            np.testing.assert_allclose(found[measure][layer], expected, atol=2e-5)
    weight = np.asarray(params["layers"][1]["mlp"]["up"]["weight"], float)
    s = np.linalg.svd(weight, compute_uv=False)
    stable = (s**2).sum() / s[0] ** 2
    assert found["stable_rank.up"][1] == pytest.approx(stable, rel=1e-3)
    attn, head = params["layers"][1]["attn"], cfg.num_heads - 1
    q, k = (
        np.asarray(attn[name]["weight"], float).reshape(-1, cfg.head_dim, cfg.hidden_size)
        for name in "qk"
    )
    s = np.linalg.svd(q[head].T @ k[-1], compute_uv=False)
    assert found["stable_rank.qk"][1, head] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-4)
    shares = s[s > 1e-9 * s[0]] / s.sum()
    effective = np.exp(-(shares * np.log(shares)).sum())
    assert found["effective_rank.qk"][1, head] == pytest.approx(effective, rel=1e-4)
    names = {part for layer in params["layers"] for half in ("attn", "mlp") for part in layer[half]}
    assert {f"effective_rank.{part}" for part in names} <= set(found)
    if name == "opt":  # of a ReLU about a half is zero
        assert 0.4 < found["sparsity"].min() < found["sparsity"].max() < 0.65


def test_active_neurons_are_counted_against_the_largest_of_the_token():
    hidden = np.array([[4.0, 0.0, 0.03, -4.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(sparsity(hidden), [0.5, 1.0, 0.5])
    np.testing.assert_allclose(activity_overlap(hidden), [0.0, 0.0])
    np.testing.assert_allclose(activity_overlap(hidden[[1, 1]]), [1.0])
    np.testing.assert_allclose(activity_overlap(hidden[[0, 2]]), [1 / 3])


def test_a_layer_without_attention_has_no_measures_of_heads():
    found = measure_model(hyena_models.lm_of("multi"), random_tokens(1, 12))
    for name in PER_HEAD:
        assert np.isnan(found[name]).all(axis=1).tolist() == [True, False, True]
    assert np.isfinite(found["sparsity"]).all()


def test_one_token_is_refused():
    with pytest.raises(ValueError, match="texts of one token"):
        measure_model(lm_of("llama"), random_tokens(1, 1))
