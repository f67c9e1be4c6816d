"""The parameters of a Hyena layer: their shapes, how they start, and filters made once.

Linear layers have the model's dtype. All else, filters, poles, residues, skips and the short
filter, is float32 whatever that is: `jaxinfer.models.params.stays`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxinfer.config import ModelConfig
from jaxinfer.hyena_config import HyenaConfig
from jaxinfer.models.shapes import abstract_linear
from jaxinfer.nn.hyena import response
from jaxinfer.typing import Params

MODAL_KINDS = ("modal", "real", "undelayed")
RING = (0.5, 0.99)  # of the poles of filters that are trained as modes (laughing_hyena.md 2.5)


def abstract_layer(cfg: ModelConfig, layer: int, dtype: DTypeLike) -> Params:
    """As `jax.ShapeDtypeStruct` leaves."""
    own, d = config_of(cfg), cfg.hidden_size
    filters, width = own.filters(d), (own.order + 1) * d
    params: Params = {
        "in": abstract_linear(d, width, True, dtype),
        "short": {"taps": _array(width, own.short_taps)},
        "filter": _abstract_filter(cfg, filters),
        "out": abstract_linear(d, d, True, dtype),
    }
    if own.short_bias:
        params["short"]["bias"] = _array(width)
    if own.filter.kind not in MODAL_KINDS:
        params["skip"] = _array(filters)
    modes, taps = (0 if x is None else x[layer] for x in (own.modes, own.taps))
    if modes or taps:
        params["modal"] = _abstract_modes(filters, modes, taps)
    return params


def _abstract_filter(cfg: ModelConfig, filters: int) -> Params:
    own = config_of(cfg).filter
    shape = (filters, own.modes)
    if own.kind == "implicit":
        from jaxinfer.nn.filters import ImplicitFilter  # flax is slow to import

        module = ImplicitFilter(filters, cfg.max_positions, own)
        return jax.eval_shape(lambda key: module.init(key, 1), jax.random.key(0))["params"]
    if own.kind == "explicit":
        return {"h": _array(filters, cfg.max_positions)}
    if own.kind == "modal":
        return _abstract_modes(*shape, 0)
    if own.kind == "real":
        return {"nu": _array(*shape), "a": _array(*shape), "h0": _array(filters)}
    names = ("pole_re", "pole_im", "residue_re", "residue_im")
    return {name: _array(*shape) for name in names} | {"skip": _array(filters)}


def _abstract_modes(filters: int, modes: int, taps: int) -> Params:
    names = ("nu", "theta", "a", "b") if modes else ()
    params = {name: _array(filters, modes) for name in names} | {"h0": _array(filters)}
    return params | ({"taps": _array(filters, taps)} if taps else {})


def initialised(cfg: ModelConfig, params: Params, key: jax.Array) -> Params:
    """The layer with its filters drawn: skips N(0, 1), the short filter +-1 / sqrt(S)."""
    own = config_of(cfg)
    keys = iter(jax.random.split(key, 4))
    bound = own.short_taps**-0.5
    shapes = {name: leaf.shape for name, leaf in params["short"].items()}
    params = params | {
        "short": {
            name: jax.random.uniform(next(keys), shape, jnp.float32, -bound, bound)
            for name, shape in shapes.items()
        },
        "filter": _drawn(cfg, params["filter"], next(keys)),
    }
    if "skip" in params:
        params["skip"] = jax.random.normal(next(keys), params["skip"].shape)
    return params


def _drawn(cfg: ModelConfig, params: Params, key: jax.Array) -> Params:
    own, filters = config_of(cfg).filter, config_of(cfg).filters(cfg.hidden_size)
    if own.kind == "implicit":
        from jaxinfer.nn.filters import ImplicitFilter

        return dict(ImplicitFilter(filters, cfg.max_positions, own).init(key, 1)["params"])
    if own.kind == "explicit":
        return {"h": _decaying(key, params["h"].shape)}
    radius_key, angle_key, a_key, b_key = jax.random.split(key, 4)
    shape = (filters, own.modes)
    radius = jax.random.uniform(radius_key, shape, jnp.float32, *RING)
    theta = jax.random.uniform(angle_key, shape, jnp.float32, -math.pi, math.pi)
    a, b = (own.modes**-0.5 * jax.random.normal(k, shape) for k in (a_key, b_key))
    if own.kind == "undelayed":
        poles = {"pole_re": radius * jnp.cos(theta), "pole_im": radius * jnp.sin(theta)}
        return poles | {"residue_re": a, "residue_im": b, "skip": jnp.ones(filters)}
    drawn = {"nu": jnp.log(-jnp.log(radius)), "theta": theta, "a": a, "b": b}
    return {name: drawn[name] for name in params if name in drawn} | {"h0": jnp.ones(filters)}


def _decaying(key: jax.Array, shape: tuple[int, ...]) -> Array:
    """White noise under a window that falls to a hundredth, of about unit energy."""
    decay = np.exp(-np.linspace(0, math.log(100), shape[1], dtype=np.float32))
    return jax.random.normal(key, shape) * decay / np.sqrt((decay**2).sum())


def with_made_filters(cfg: ModelConfig, params: Params) -> Params:
    """The layer with an implicit filter as its values, which no step need compute again."""
    own = params["filter"]
    unread = "modal" in params and config_of(cfg).prompt == "modal"
    if "last" not in own or unread:
        return params
    if isinstance(own["last"], jax.ShapeDtypeStruct):
        return params | {"filter": {"h": _array(*params["skip"].shape, cfg.max_positions)}}
    bare = {"filter": own, "skip": jnp.zeros_like(params["skip"])}
    h = values(config_of(cfg), bare, cfg.max_positions, cfg.max_positions)
    return params | {"filter": {"h": h}}


values = jax.jit(response, static_argnums=(0, 2, 3))
"""`jaxinfer.nn.hyena.response` of parameters that are there."""


def config_of(cfg: ModelConfig) -> HyenaConfig:
    """Of a model that has such layers."""
    assert cfg.hyena is not None
    return cfg.hyena


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
