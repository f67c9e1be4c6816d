"""The sparse feed-forward block for the Triton back end, in two launches.

The listed neurons, one block after another, form a compact axis of places. "up" writes the hidden
value of each place to a scratch array. "down" splits the live places evenly over its programs, by
the count that it finds there, and XLA adds the parts: no atomics, so equal inputs give equal bits.
Tiles are cut from places, not from blocks, so a block may have any size.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.activation import KERNEL
from pallas_kernels.common import exact_dot, launch, load, store
from pallas_kernels.shapes import blocks_of
from pallas_kernels.sparse_mlp.configs import Config, row_tile


def sparse_mlp(
    x, gate, up, down, blocks, count, row_mask, up_bias, gate_bias,
    *, config: Config, interpret, block_size, activation,
):  # fmt: skip
    lists, rows, width = x.shape
    places = blocks.shape[1] * block_size
    lines = blocks_of(rows, row_tile(rows))
    run = functools.partial(launch, warps=config.warps, stages=config.stages, interpret=interpret)
    given = {
        "x": x, "up": up, "blocks": blocks, "count": count, "gate": gate, "up_bias": up_bias,
        "gate_bias": gate_bias, "row_mask": None if row_mask is None else row_mask.astype(jnp.int8),
    }  # fmt: skip
    given = {name: operand for name, operand in given.items() if operand is not None}
    hidden = run(
        functools.partial(
            _up_kernel, tuple(given), config=config, block_size=block_size, activation=activation
        ),
        *given.values(),
        out=jax.ShapeDtypeStruct((lists, rows, places), down.dtype),
        grid=(blocks_of(places, config.neurons), lists, lines),
        name="sparse_mlp_up",
    )
    parts = run(
        functools.partial(_down_kernel, config=config, block_size=block_size),
        hidden, down, blocks, count,
        out=jax.ShapeDtypeStruct((config.splits, lists, rows, width), jnp.float32),
        grid=(blocks_of(width, config.columns), config.splits, lists * lines),
        name="sparse_mlp_down",
    )  # fmt: skip
    return parts.sum(axis=0)


def _up_kernel(names, *refs, config, block_size, activation):
    *refs, hidden_ref = refs
    given = dict(zip(names, refs, strict=True))
    c, first = pl.program_id(1), pl.program_id(0) * config.neurons
    _, rows, _ = given["x"].shape
    row = pl.program_id(2) * row_tile(rows) + jnp.arange(row_tile(rows))
    listing = Listing(given["blocks"], given["count"], c, block_size, given["up"].shape[0])

    @pl.when(first < listing.live)
    def _():
        tile = listing.tile(first, config.neurons)
        used = [name for name in ("up", "gate") if name in given]
        sums = _project(given["x"], c, [given[name] for name in used], row, tile, config.depth)
        up, *gate = (
            s + tile.bias(given[f"{name}_bias"]) if f"{name}_bias" in given else s
            for name, s in zip(used, sums, strict=True)
        )
        act = KERNEL[activation]
        h = act(gate[0]) * up if gate else act(up)
        mask = (row < rows)[:, None] & tile.listed[None]
        if "row_mask" in given:
            entry = tile.places // block_size
            chosen = load(
                given["row_mask"].at[c, row[:, None], entry[None]], mask=mask, other=0
            )  # fmt: skip
            h = jnp.where(chosen != 0, h, 0.0)
        store(
            hidden_ref.at[c, row[:, None], tile.places[None]],
            h.astype(hidden_ref.dtype), mask=mask,
        )  # fmt: skip


def _project(x_ref, c, weights, row, tile, depth):
    """List c's x times w^T, f32[rows, neurons of the tile], for each w of `weights`."""
    _, rows, width = x_ref.shape
    one = len(row) == 1

    def body(i, sums):
        columns = i * depth + jnp.arange(depth)
        inside = columns < width
        if one:
            x = load(x_ref.at[c, 0, columns], mask=inside, other=0.0).astype(jnp.float32)
            products = (tile.weights(w, columns).astype(jnp.float32) * x[None] for w in weights)
        else:
            mask = (row < rows)[:, None] & inside[None]
            x = load(x_ref.at[c, row[:, None], columns[None]], mask=mask, other=0.0)
            products = (exact_dot(x, tile.weights(w, columns).T) for w in weights)
        return tuple(s + p for s, p in zip(sums, products, strict=True))

    # A single row sums over the lanes once, behind the loop.
    shape = (len(tile.places), depth) if one else (len(row), len(tile.places))
    zeros = tuple(jnp.zeros(shape, jnp.float32) for _ in weights)
    sums = jax.lax.fori_loop(0, blocks_of(width, depth), body, zeros)
    return [jnp.sum(s, axis=1)[None] for s in sums] if one else list(sums)


def _down_kernel(hidden_ref, down_ref, blocks_ref, count_ref, out_ref, *, config, block_size):
    _, rows, _ = hidden_ref.shape
    tile_rows, width = row_tile(rows), down_ref.shape[1]
    lines = blocks_of(rows, tile_rows)
    c, split = pl.program_id(2) // lines, pl.program_id(1)
    row = pl.program_id(2) % lines * tile_rows + jnp.arange(tile_rows)
    columns = pl.program_id(0) * config.columns + jnp.arange(config.columns)
    listing = Listing(blocks_ref, count_ref, c, block_size, down_ref.shape[0])
    steps = (listing.live + config.chain - 1) // config.chain
    part = (steps + config.splits - 1) // config.splits
    first = split * part

    def body(i, acc):
        tile = listing.tile(i * config.chain, config.chain)
        w = tile.weights(down_ref, columns)
        if tile_rows == 1:
            h = load(hidden_ref.at[c, 0, tile.places], mask=tile.listed, other=0.0)
            return acc + h.astype(jnp.float32)[:, None] * w.astype(jnp.float32)
        mask = (row < rows)[:, None] & tile.listed[None]
        h = load(hidden_ref.at[c, row[:, None], tile.places[None]], mask=mask, other=0.0)
        return acc + exact_dot(h, w)

    shape = (config.chain if tile_rows == 1 else tile_rows, config.columns)
    last = jnp.minimum(first + part, steps)
    acc = jax.lax.fori_loop(first, last, body, jnp.zeros(shape, jnp.float32))
    store(
        out_ref.at[split, c, row[:, None], columns[None]],
        jnp.sum(acc, axis=0)[None] if tile_rows == 1 else acc,
        mask=(row < rows)[:, None] & (columns < width)[None],
    )  # fmt: skip


class Listing:
    """The list of a program: `live` places, `block_size` of each entry below the count."""

    def __init__(self, blocks_ref, count_ref, c, block_size: int, hidden: int):
        self.blocks_ref, self.c, self.block_size, self.hidden = blocks_ref, c, block_size, hidden
        self.live = jnp.minimum(count_ref[c], blocks_ref.shape[1]) * block_size

    def tile(self, first, size: int) -> "Tile":
        return Tile(self, first + jnp.arange(size))


class Tile:
    """Some places: whether they are `listed`, and the weights of the neurons that stand there."""

    def __init__(self, listing: Listing, places):
        self.places, self.listed = places, places < listing.live
        entry = listing.blocks_ref.at[listing.c, places // listing.block_size]
        block = load(entry, mask=self.listed, other=0)
        self.neurons = block * listing.block_size + places % listing.block_size
        self.exists = self.listed & (self.neurons < listing.hidden)  # the last block may be short

    def weights(self, ref, columns):
        mask = self.exists[:, None] & (columns < ref.shape[1])[None]
        return load(ref.at[self.neurons[:, None], columns[None]], mask=mask, other=0.0)

    def bias(self, ref):
        return load(ref.at[self.neurons], mask=self.exists, other=0.0).astype(jnp.float32)[None]
