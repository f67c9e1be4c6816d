"""How much of each weight's inputs to drop, layer by layer, so that the layer's output changes
least: the greedy search of TEAL (arXiv 2408.14690, section 4.3), which WINA (2505.19427) uses too.

From nothing dropped, every step tries each weight of the layer with a little more dropped, as much
as saves the same number of products whatever the weight's size, and keeps the trial with the
smallest error of the layer's output on the calibration text. The sizes are the model's own, also of
keys and values that several query heads share.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.cache.context import chain_context
from jaxinfer.cache.policy import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.models.attention import attention_spec
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.stack import NO_CACHE, blocks, embed
from jaxinfer.nn.linear import rows
from jaxinfer.sparsity.calibration import Calibration, threshold_at
from jaxinfer.sparsity.inputs import SparseInputs
from jaxinfer.sparsity.observe import layer_weights
from jaxinfer.typing import Leaf, Params

STEP = 0.1  # of the queries' inputs; of another weight's as much as is as many products
SEARCHED = 512  # tokens that the search looks at, at most

Part = tuple[str, str]
"""The name of a weight in its layer, such as ("mlp", "up")."""


class Allocation:
    """The layers of a calibrated model, and how far each one's search has come."""

    def __init__(self, calibration: Calibration, *, weighted: bool, step: float = STEP):
        self.calibration, self.weighted, self.step = calibration, weighted, step
        self.parts: list[dict[Part, Leaf]] = [{} for _ in calibration.params["layers"]]
        for name, weight in layer_weights(calibration.params).items():
            layer, block, part = name
            self.parts[int(layer)][str(block), str(part)] = weight
        self._origin = fingerprint(calibration.params)
        self._norms: dict[tuple[int, Part], Array] = {}
        self._paths: dict[int, list[dict[Part, float]]] = {}
        self._states = _states(calibration)

    def params(self, density: float, *, greedy: bool = True) -> Params:
        """The model whose layers multiply a share `density` of what the dense ones do."""
        params = self.calibration.params
        layers = []
        for index in range(len(self.parts)):
            if greedy and density < 1:
                dropped = self.dropped(index, 1 - density)
            else:
                dropped = dict.fromkeys(self.parts[index], 1 - density)
            layers.append(self._layer(index, dropped))
        return params | {"layers": tuple(layers)}

    def dropped(self, layer: int, share: float) -> dict[Part, float]:
        """The share of each weight's inputs to drop, so that it is `share` of the layer's
        products: what the search passes through, between its steps in proportion."""
        path = self._paths.setdefault(layer, [dict.fromkeys(self.parts[layer], 0.0)])
        while self.saved(layer, path[-1]) < share:
            path.append(self._next(layer, path[-1]))
        behind = next(i for i, dropped in enumerate(path) if self.saved(layer, dropped) >= share)
        if behind == 0:
            return path[0]
        before, after = path[behind - 1], path[behind]
        low, high = self.saved(layer, before), self.saved(layer, after)
        way = (share - low) / (high - low)
        return {part: (1 - way) * before[part] + way * after[part] for part in after}

    def saved(self, layer: int, dropped: Mapping[Part, float]) -> float:
        """The share of the layer's products that is not computed."""
        sizes = self._sizes(layer)
        return sum(dropped[part] * size for part, size in sizes.items()) / sum(sizes.values())

    def _sizes(self, layer: int) -> dict[Part, int]:
        return {part: int(np.prod(weight.shape)) for part, weight in self.parts[layer].items()}

    def _next(self, layer: int, dropped: Mapping[Part, float]) -> dict[Part, float]:
        sizes = self._sizes(layer)
        unit = self.step * sizes.get(("attn", "q"), max(sizes.values()))
        trials = []
        for part, size in sizes.items():
            more = min(dropped[part] + unit / size, 1.0)
            if more > dropped[part]:
                trials.append({**dropped, part: more})
        return min(trials, key=lambda trial: self._error(layer, trial))

    def _error(self, layer: int, dropped: Mapping[Part, float]) -> float:
        cfg = self.calibration.cfg
        like = next(i for i in range(layer + 1) if _alike(cfg, i, layer))
        x, wanted = self._states[layer], self._states[layer + 1]
        found = _run_layer(cfg, like, self._layer(layer, dropped), x)
        return float(jnp.linalg.norm(found - wanted))

    def _layer(self, layer: int, dropped: Mapping[Part, float]) -> Params:
        new = dict(self.calibration.params["layers"][layer])
        for (block, part), share in dropped.items():
            weight = self._sparse(layer, (block, part), 1 - share)
            new[block] = new[block] | {part: new[block][part] | {"weight": weight}}
        return new

    def _sparse(self, layer: int, part: Part, density: float) -> SparseInputs:
        weight = self.parts[layer][part]
        identity = {"dtype": str(weight.dtype), "origin": self._origin}
        if not self.weighted:
            levels = self.calibration.inputs[layer, *part]
            threshold = jnp.float32(threshold_at(levels, density))
            return SparseInputs(weight=weight, threshold=threshold, **identity)
        if (layer, part) not in self._norms:
            self._norms[layer, part] = _column_norms(weight)
        most = jnp.int32(max(round(density * weight.shape[1]), 1))
        norms = self._norms[layer, part]
        return SparseInputs(weight=weight, most=most, norms=norms, **identity)


def _states(calibration: Calibration) -> list[Array]:
    """The residual stream in front of every layer and behind the last."""
    cfg, params = calibration.cfg, calibration.params
    rows = max(SEARCHED // calibration.tokens.shape[1], 1)
    tokens = calibration.tokens[:rows, :SEARCHED]
    states = [embed(cfg, params, tokens, _context(*tokens.shape))]
    for index, layer in enumerate(params["layers"]):
        like = next(i for i in range(index + 1) if _alike(cfg, i, index))
        states.append(_run_layer(cfg, like, layer, states[-1]))
    return states


def _context(batch: int, size: int):
    return chain_context(jnp.zeros((batch,), jnp.int32), jnp.full((batch,), size, jnp.int32), size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(cfg: ModelConfig, index: int, layer: Params, x: Array) -> Array:
    batch, size, _ = x.shape
    cache = Cache(length=jnp.zeros((batch,), jnp.int32), layers=((),), policies=(NO_CACHE,))
    params = {"layers": (layer,)}
    context = _context(batch, size)
    return blocks(cfg, params, cache, x, context, layers=range(index, index + 1))[0]


def _alike(cfg: ModelConfig, one: int, other: int) -> bool:
    """Whether two layers are one program."""

    def kind(layer: int) -> Sequence[object]:
        return cfg.mixer(layer), cfg.mlp(layer), attention_spec(cfg, layer)

    return kind(one) == kind(other)


def _column_norms(weight: Leaf) -> Array:
    """f32[I]; a stored weight's are those of what it stands for."""
    whole = rows(weight, jnp.arange(weight.shape[0]))
    return jnp.linalg.norm(whole.astype(jnp.float32), axis=0)
