"""put_tokens for the Triton back end: a program owns some tokens of a row and head."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.common import launch, load, store
from pallas_kernels.put_tokens.configs import Config
from pallas_kernels.put_tokens.reference import as_stored
from pallas_kernels.shapes import blocks_of, power_of_two


def put_tokens(stored, tokens, index, *, config: Config, interpret: bool):
    return _launched(stored, tokens, index, (), config, interpret)


def swap_tokens(stored, tokens, index, *, config: Config, interpret: bool):
    left = tuple(
        jax.ShapeDtypeStruct(
            (*old.shape[:2], *new.shape[2:]), jnp.promote_types(old.dtype, new.dtype)
        )
        for old, new in zip(stored, tokens, strict=True)
    )
    results = _launched(stored, tokens, index, left, config, interpret)
    return results[: len(stored)], results[len(stored) :]


def _launched(stored, tokens, index, left, config, interpret):
    batch, heads = stored[0].shape[:2]
    count = index.shape[-1]
    kernel = functools.partial(
        _kernel, arrays=len(stored), part=config.tokens, waits=bool(left) and not interpret
    )
    return launch(
        kernel, *stored, *tokens, index,
        out=(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored), *left),
        grid=(batch * heads, blocks_of(count, config.tokens)),
        name="swap_tokens" if left else "put_tokens", warps=config.warps, interpret=interpret,
        aliases={i: i for i in range(len(stored))},
    )  # fmt: skip


def _kernel(*refs, arrays, part, waits):
    tokens, index_ref, results = refs[arrays : 2 * arrays], refs[2 * arrays], refs[2 * arrays + 1 :]
    # What lies in the slots is read where it is overwritten, so that the order is certain.
    stored, left = results[:arrays], results[arrays:] or (None,) * arrays
    heads, capacity = stored[0].shape[1:3]
    b, h = pl.program_id(0) // heads, pl.program_id(0) % heads
    token = pl.program_id(1) * part + jnp.arange(part)
    here = token < index_ref.shape[-1]
    at = (b, token) if len(index_ref.shape) == 2 else (b, h, token)
    slot = load(index_ref.at[at], mask=here, other=capacity)
    is_put = here & (slot >= 0) & (slot < capacity)
    slot = jnp.where(is_put, slot, capacity)

    writes = []
    for old_ref, new_ref, left_ref in zip(stored, tokens, left, strict=True):
        place, source, given, puts = (slot,), (token,), here, is_put
        if len(old_ref.shape) == 4:
            channel = jnp.arange(power_of_two(old_ref.shape[3]))[None]
            inside = channel < old_ref.shape[3]
            place, source = (slot[:, None], channel), (token[:, None], channel)
            given, puts = here[:, None] & inside, is_put[:, None] & inside
        head = h if new_ref.shape[1] > 1 else 0
        new = load(new_ref.at[b, head, *source], mask=given, other=_zero(new_ref))
        target = old_ref.at[b, h, *place]
        if left_ref is not None:
            old = load(target, mask=puts, other=_zero(old_ref))
            gone = jnp.where(puts, old.astype(left_ref.dtype), new.astype(left_ref.dtype))
            store(left_ref.at[b, h, *source], gone, mask=given)
        writes.append((target, as_stored(new, old_ref.dtype), puts))
    if waits:
        plgpu.debug_barrier()  # no thread overwrites what another one has yet to read
    for target, numbers, puts in writes:
        store(target, numbers, mask=puts)


def _zero(ref):
    return jnp.zeros((), ref.dtype)
