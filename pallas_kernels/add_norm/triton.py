"""The residual sum and norm for the Triton back end: a program owns a row, read once."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common import launch, load, store
from pallas_kernels.shapes import power_of_two


def add_norm(x, delta, scale, bias, *, kind, eps, config, interpret):
    given = [one for one in (x, delta, scale, bias) if one is not None]
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)] * (1 if delta is None else 2)
    kernel = functools.partial(
        _kernel, has_delta=delta is not None, has_bias=bias is not None, kind=kind, eps=eps
    )
    results = launch(
        kernel, *given, out=tuple(out), grid=(len(x),), name="add_norm", warps=config.warps,
        interpret=interpret,
    )  # fmt: skip
    return (x, *results) if delta is None else results


def _kernel(*refs, has_delta, has_bias, kind, eps):
    refs = list(refs)
    x_ref = refs.pop(0)
    delta_ref = refs.pop(0) if has_delta else None
    scale_ref = refs.pop(0)
    bias_ref = refs.pop(0) if has_bias else None
    row, width = pl.program_id(0), x_ref.shape[1]
    column = jnp.arange(power_of_two(width))
    here = column < width

    y = load(x_ref.at[row, column], mask=here, other=0.0)
    if delta_ref is not None:
        delta = load(delta_ref.at[row, column], mask=here, other=0.0)
        y = (y + delta).astype(y.dtype)
        store(refs.pop(0).at[row, column], y, mask=here)
    wide = y.astype(jnp.float32)
    if kind == "layer":
        wide = jnp.where(here, wide - jnp.sum(wide) / width, 0.0)
    square = jnp.sum(wide * wide) / width
    if kind == "rms_outside":
        wide = wide / (jnp.sqrt(square) + eps)
    else:
        wide = wide * jax.lax.rsqrt(square + eps)
    wide = wide * load(scale_ref.at[column], mask=here, other=0.0).astype(jnp.float32)
    if bias_ref is not None:
        wide = wide + load(bias_ref.at[column], mask=here, other=0.0).astype(jnp.float32)
    store(refs.pop(0).at[row, column], wide.astype(y.dtype), mask=here)
