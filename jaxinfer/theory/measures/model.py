"""What can be said of one model: how sparse its attention is, of what rank its matrices are, and
how many of its neurons are active; layer by layer, in the memory of one layer.

Axis letters: L layers, N heads, Q texts.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxinfer.models.walk import HasParameters, LayerView, walk
from jaxinfer.nn.linear import rows
from jaxinfer.theory.measures import activity, attention
from jaxinfer.theory.measures.attention import entropy
from jaxinfer.theory.measures.spectrum import effective_rank, stable_rank
from jaxinfer.typing import Params

SINKS, TOP = 4, 16

OF_ATTENTION = (
    "relative_entropy", "effective_keys", "sink_mass", "top_mass", "heavy_hitter_overlap",
)  # fmt: skip
PER_HEAD = (*OF_ATTENTION, "stable_rank.qk", "effective_rank.qk")
PER_LAYER = ("sparsity", "activity_overlap")

Measures: TypeAlias = dict[str, np.ndarray]
"""By name: those of `PER_HEAD` f32[L, N], the others f32[L]."""


def measure_model(
    model: HasParameters,
    tokens: Int[np.ndarray, "Q T"],
    *,
    block: int = 128,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Measures:
    """Measures of a model that reads texts; means over queries and texts.

    Per head: `relative_entropy` (over ln of how many keys a query may see), `effective_keys`,
    `sink_mass` of the first 4 keys, `top_mass` of the 16 largest, and `heavy_hitter_overlap`: of
    the tenth of the first half's keys that its queries attend to most, which part the second
    half's queries do too; `stable_rank.qk` and `effective_rank.qk` of the product of its query and
    key matrices, as it is without rotation and norms. Per layer: `sparsity` and `activity_overlap`
    of the feed-forward block, and `stable_rank.NAME` and `effective_rank.NAME` of every matrix. NaN
    where a layer has no such thing.

    Args:
      model: an `LM`, or what else has a `config` and `params`.
      tokens: texts of equally many tokens, two at least.
      block: queries whose attention exists at a time.
      report: called with the layers done and all of them.

    Raises:
      ValueError: the model cannot read the texts.
    """
    if tokens.shape[1] < 2:
        raise ValueError("texts of one token have no attention to measure; give longer ones")
    layers: list[dict[str, np.ndarray | float]] = []
    for view in walk(model, tokens):
        found = {} if view.q is None else _of_heads(view, block) | _of_products(view)
        found["sparsity"] = activity.sparsity(view.hidden).mean()
        found["activity_overlap"] = activity.activity_overlap(view.hidden).mean()
        layers.append(found | _ranks(view.params))
        report(view.index + 1, model.config.num_layers)
    names = list(dict.fromkeys([*PER_HEAD, *PER_LAYER, *(n for one in layers for n in one)]))
    lacking = {name: np.full(model.config.num_heads, np.nan) for name in PER_HEAD}
    return {
        name: np.asarray([one.get(name, lacking.get(name, np.nan)) for one in layers], np.float32)
        for name in names
    }


def _of_heads(view: LayerView, block: int) -> dict[str, np.ndarray | float]:
    """Measures of the layer's attention, f64[N] each."""
    texts, size = view.before.shape[:2]
    sums: dict[str, np.ndarray] = {name: np.zeros(view.q.shape[2]) for name in OF_ATTENTION}
    for text in range(texts):
        received, first = np.zeros((2, view.q.shape[2], size // 2)), 0
        for weights in view.attention(text, block):
            weights = weights.astype(np.float64)
            place = first + np.arange(len(weights))
            keys = np.broadcast_to(place[:, None] + 1, weights.shape[:2])
            found = {
                "relative_entropy": attention.relative_entropy(weights, keys),
                "effective_keys": attention.effective_keys(weights),
                "sink_mass": attention.sink_mass(weights, SINKS),
                "top_mass": attention.top_mass(weights, TOP),
            }
            for name, x in found.items():
                sums[name] += x.sum(axis=0) / (texts * size)
            for half in (0, 1):
                mine = (place >= size // 2) == half
                received[half] += weights[mine, :, : size // 2].sum(axis=0)
            first += len(weights)
        sums["heavy_hitter_overlap"] += (
            attention.heavy_hitter_overlap(received[0], received[1]) / texts
        )
    return dict(sums)


def _of_products(view: LayerView) -> dict[str, np.ndarray | float]:
    """Ranks of W_Q^T W_K of each head, by the singular values of a small matrix: those of the
    triangular factors' product."""
    heads, size = view.q.shape[2:]

    def triangular(name: str) -> np.ndarray:
        weight = view.params["attn"][name]["weight"]
        matrix = np.asarray(rows(weight, jnp.arange(weight.shape[0])), np.float64)
        by_head = matrix.reshape(-1, size, matrix.shape[1])
        return np.asarray(np.linalg.qr(by_head.swapaxes(1, 2), mode="r"))

    keys = triangular("k")
    keys = np.repeat(keys, heads // len(keys), axis=0)
    values = np.linalg.svd(triangular("q") @ keys.swapaxes(1, 2), compute_uv=False)
    largest, total = values[:, :1], values.sum(axis=1, keepdims=True)
    shares = values / np.where(total > 0, total, 1)
    return {
        "stable_rank.qk": np.square(values / np.where(largest > 0, largest, 1)).sum(axis=1),
        "effective_rank.qk": np.where(total[:, 0] > 0, np.exp(entropy(shares)), 0.0),
    }


def _ranks(layer: Params) -> dict[str, np.ndarray | float]:
    """Of every matrix of a layer, by its name."""
    found: dict[str, np.ndarray | float] = {}
    for part in layer.values():
        for name, one in part.items():
            weight = one.get("weight") if isinstance(one, Mapping) else None
            if weight is None or len(weight.shape) != 2:
                continue
            matrix = rows(weight, jnp.arange(weight.shape[0])).astype(jnp.float32)
            found[f"stable_rank.{name}"] = float(_stable(matrix))
            found[f"effective_rank.{name}"] = float(_effective(matrix))
    return found


_stable, _effective = jax.jit(stable_rank), jax.jit(effective_rank)
