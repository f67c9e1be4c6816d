"""The modal recurrence for the Triton back end: a program owns some channels of some rows."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common import launch, load, store
from pallas_kernels.modal_step.configs import Config
from pallas_kernels.shapes import blocks_of


def modal_step(state_re, state_im, u, *filters, config: Config, interpret):
    return _launch(
        _modal_kernel, "modal_step", (state_re, state_im, u, *filters),
        out=(u, state_re, state_im), like=state_re, aliases={0: 1, 1: 2},
        config=config, interpret=interpret,
    )  # fmt: skip


def hyena_step(p, past, taps, bias, state_re, state_im, *filters, config: Config, interpret):
    y = jax.ShapeDtypeStruct(state_re.shape[:2], p.dtype)
    return _launch(
        _hyena_kernel, "hyena_step", (p, past, taps, bias, state_re, state_im, *filters),
        out=(y, past, state_re, state_im), like=state_re, aliases={1: 1, 4: 2, 5: 3},
        config=config, interpret=interpret,
    )  # fmt: skip


def _launch(kernel, name, args, *, out, like, aliases, config: Config, interpret):
    batch, channels, _ = like.shape
    return launch(
        functools.partial(kernel, config=config), *args,
        out=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out),
        grid=(blocks_of(channels, config.channels), blocks_of(batch, config.rows)),
        name=name, warps=config.warps, stages=1, interpret=interpret, aliases=aliases,
    )  # fmt: skip


def _modal_kernel(state_re_ref, state_im_ref, u_ref, *refs, config):
    *filters, y_ref, new_re_ref, new_im_ref = refs
    tile = Tile(state_re_ref, config)
    u = load(u_ref.at[tile.place], mask=tile.inside, other=0.0).astype(jnp.float32)
    y = tile.modal(u, (state_re_ref, state_im_ref), filters, (new_re_ref, new_im_ref))
    store(y_ref.at[tile.place], y.astype(y_ref.dtype), mask=tile.inside)


def _hyena_kernel(p_ref, past_ref, taps_ref, bias_ref, state_re_ref, state_im_ref, *refs, config):
    *filters, y_ref, new_past_ref, new_re_ref, new_im_ref = refs
    tile = Tile(state_re_ref, config)
    fir = functools.partial(tile.short_filter, p_ref, past_ref, taps_ref, bias_ref, new_past_ref)
    gate, x, v = (fir(third) for third in range(3))
    z = tile.modal(x * v, (state_re_ref, state_im_ref), filters, (new_re_ref, new_im_ref))
    store(y_ref.at[tile.place], (gate * z).astype(y_ref.dtype), mask=tile.inside)


class Tile:
    """`rows` of the batch by `channels`, with all modes of these."""

    def __init__(self, state_ref, config: Config):
        batch, self.width, modes = state_ref.shape
        self.b = (pl.program_id(1) * config.rows + jnp.arange(config.rows))[:, None]
        self.d = (pl.program_id(0) * config.channels + jnp.arange(config.channels))[None]
        self.place = (self.b, self.d)
        self.known = self.d < self.width
        self.inside = (self.b < batch) & self.known
        self.modes, self.group = modes, config.modes

    def modal(self, u, state_refs, filter_refs, new_refs):
        """y f32[rows, channels]; writes the states."""
        *coefficient_refs, h0_ref = filter_refs
        b, d = self.b[:, :, None], self.d[:, :, None]
        y = load(h0_ref.at[self.d], mask=self.known, other=0.0) * u
        for first in range(0, self.modes, self.group):
            k = (first + jnp.arange(self.group))[None, None]
            mask, known = (x[:, :, None] & (k < self.modes) for x in (self.inside, self.known))
            re, im = (load(ref.at[b, d, k], mask=mask, other=0.0) for ref in state_refs)
            pole_re, pole_im, residue_re, residue_im = (
                load(ref.at[d, k], mask=known, other=0.0) for ref in coefficient_refs
            )
            y = y + jnp.sum(residue_re * re - residue_im * im, axis=2)
            new = (pole_re * re - pole_im * im + u[:, :, None], pole_im * re + pole_re * im)
            for ref, x in zip(new_refs, new, strict=True):
                store(ref.at[b, d, k], x, mask=mask)
        return y

    def short_filter(self, p_ref, past_ref, taps_ref, bias_ref, new_past_ref, third: int):
        """The filtered projection, f32[rows, channels], of one third; shifts its past by one."""
        d, last = third * self.width + self.d, past_ref.shape[2]
        now = load(p_ref.at[self.b, d], mask=self.inside, other=0.0).astype(past_ref.dtype)
        total = load(bias_ref.at[d], mask=self.known, other=0.0)
        for j in range(last + 1):
            x = now
            if j < last:
                x = load(past_ref.at[self.b, d, j], mask=self.inside, other=0.0)
            tap = load(taps_ref.at[d, j], mask=self.known, other=0.0)
            total = total + tap * x.astype(jnp.float32)
            if j > 0:  # its old neighbour has been read
                store(new_past_ref.at[self.b, d, j - 1], x, mask=self.inside)
        return total
