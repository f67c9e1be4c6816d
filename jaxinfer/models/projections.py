"""The projections around attention: into queries, keys and values, and out of the heads."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.config import ModelConfig
from jaxinfer.nn.heads import Chosen
from jaxinfer.nn.linear import linear, linears
from jaxinfer.nn.listed import Listing, has_parts, listed_inputs, listed_outputs
from jaxinfer.nn.norm import norm
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params

Projected = tuple[Float[Array, "B _ T H"], ...]


def project(
    cfg: ModelConfig,
    params: Params,
    x: Float[Array, "B T D"],
    backend: Backend | None = None,
    *,
    names: str = "qkv",
    listing: Listing | None = None,
) -> Projected:
    """Queries [B, N, T, H], keys and values [B, K, T, H] of an attention layer, those of `names`,
    not yet rotated. With a `listing` those of its groups alone are computed."""
    parts = [params[name] for name in names]
    if listing is None or backend is None:
        found = linears(parts, x, backend)
    else:
        found = listed_outputs(parts, x.reshape(-1, x.shape[-1]), listing, backend)
    return tuple(
        _heads(cfg, params, name, y, x.shape[:2]) for name, y in zip(names, found, strict=True)
    )


def _heads(cfg: ModelConfig, params: Params, name: str, y: Array, lead: tuple[int, ...]) -> Array:
    if cfg.qkv_clip is not None:
        y = jnp.clip(y, -cfg.qkv_clip, cfg.qkv_clip)
    y = y.reshape(*lead, -1, cfg.head_dim)
    if f"{name}_norm" in params:
        y = norm(params[f"{name}_norm"], y, kind="rms", eps=cfg.norm_eps)
    return y.transpose(0, 2, 1, 3)


def output(
    params: Params,
    y: Float[Array, "B N T H"],
    backend: Backend | None = None,
    heads: Chosen | None = None,
) -> Float[Array, "B T D"]:
    """What the heads add to the residual stream; of a token with chosen `heads`, these."""
    batch, _, size, _ = y.shape
    if heads is not None:
        y = heads.masked(y)
    y = y.transpose(0, 2, 1, 3).reshape(batch, size, -1)
    out, listing = params["out"], None if heads is None else heads.listing
    if listing is None or backend is None or not has_parts(out["weight"], y.dtype, backend, 1):
        return linear(out, y, backend)
    rows = listed_inputs(out, y.reshape(batch * size, -1), listing, backend)
    return rows.reshape(batch, size, -1)
