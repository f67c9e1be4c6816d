"""Attention over packed codes for the Triton back end.

What bounds it at 2 bits is not memory but instructions: a token's key and value are 2 H codes. They
become numbers in registers (`codes`), in the very registers from which the tensor cores read them:

- Scores are computed as K q^T. Rows of the left operand are words, which hold keys of several
  tokens: a turn takes `lanes` codes of each of 16 words, `pieces` parts of the channels after one
  another.
- Outputs are V^T p^T, of which a row is a word of values, or a part of one where a token has fewer
  than 16 words; each code of a part has its own sum.
- What lies between a load and a dot is elementwise, with nothing but loads at its ends: only then
  does the compiler move words, not numbers, through shared memory. That is why shifts that differ
  from row to row, or from turn to turn, are loaded from a table.

A program is one (row, key/value head), one tile of its G * T queries and one part of the tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention_tile import ends, partials
from pallas_kernels.common import exact_dot, launch, load, store
from pallas_kernels.kivi_attention.codes import exp2, numbers, unit_and_offset
from pallas_kernels.kivi_attention.configs import WORDS, Config
from pallas_kernels.merge_splits import joined
from pallas_kernels.shapes import blocks_of
from pallas_kernels.softmax_state import NEGATIVE

LOG2E = 1.4426950408889634


def kivi_attention(
    q, k_words, k_scale, k_zero, v_words, v_scale, v_zero, visible, distance, stop, extra,
    *, key_bits: int, value_bits: int, config: Config, interpret: bool, scale, softcap, slopes,
):  # fmt: skip
    batch, heads, groups, size, width = q.shape
    rows, splits, slots = groups * size, config.splits, visible.shape[3]
    alibi = () if slopes is None else (distance, jnp.asarray(slopes, jnp.float32))
    kernel = functools.partial(
        _kernel, key_bits=key_bits, value_bits=value_bits, config=config, size=size,
        groups=groups, slots=slots, scale=scale, softcap=softcap, interpret=interpret,
    )  # fmt: skip
    parts = launch(
        kernel, q.reshape(batch, heads, rows, width), k_words, k_scale, k_zero, v_words, v_scale,
        v_zero, as_bits(visible, 32 // key_bits), ends(stop, batch, slots),
        *shifts(key_bits, value_bits, width, config), *alibi,
        out=partials(batch, heads, splits, rows, width),
        grid=(batch * heads, blocks_of(rows, config.rows), splits),
        name="kivi_attention", warps=config.warps, stages=config.stages, interpret=interpret,
    )  # fmt: skip
    return joined(parts, extra, q, interpret=interpret)


def as_bits(visible, count: int):
    """u32[B|1, K|1, T|1, words]: for each word of `count` tokens the bits of those that are seen,
    up to a whole number of tiles."""
    slots = visible.shape[3]
    room = blocks_of(slots, count * WORDS) * WORDS
    padded = jnp.pad(visible, ((0, 0), (0, 0), (0, 0), (0, room * count - slots)))
    each = padded.reshape(*visible.shape[:3], room, count).astype(jnp.uint32)
    return jnp.sum(each << jnp.arange(count, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def shifts(key_bits: int, value_bits: int, width: int, config: Config):
    """How far the words of each turn, and those of each row of the values, are shifted."""
    turns = 32 // key_bits // config.lanes
    parts, words = parts_of(width, value_bits)
    turn = jnp.repeat(jnp.arange(turns, dtype=jnp.uint32) * (config.lanes * key_bits), WORDS)
    return turn, jnp.repeat(jnp.arange(parts, dtype=jnp.uint32) * (32 // parts), words)


def parts_of(width: int, bits: int) -> tuple[int, int]:
    """Parts of a word that are rows of their own, of which there are at least 16; words a token."""
    words = width * bits // 32
    return max(16 // words, 1), words


def _kernel(
    q_ref, kw_ref, ks_ref, kz_ref, vw_ref, vs_ref, vz_ref, visible_ref, stop_ref, turn_ref,
    part_ref, *refs, key_bits, value_bits, config, size, groups, slots, scale, softcap, interpret,
):  # fmt: skip
    *alibi, acc_ref, max_ref, sum_ref = refs
    heads, width = q_ref.shape[1], q_ref.shape[3]
    b, h = pl.program_id(0) // heads, pl.program_id(0) % heads
    split = pl.program_id(2)
    rows = pl.program_id(1) * config.rows + jnp.arange(config.rows)
    exists = rows < q_ref.shape[2]
    dtype = jnp.float32 if q_ref.dtype == jnp.float32 else ks_ref.dtype
    count, lanes = 32 // key_bits, config.lanes
    turns, piece = count // lanes, width // config.pieces
    stop = jnp.minimum(stop_ref[b], slots)
    tiles = (stop + WORDS * count - 1) // (WORDS * count)
    each = (tiles + config.splits - 1) // config.splits  # of what is live, not of the capacity
    first, last = split * each, jnp.minimum((split + 1) * each, tiles)

    channels = [n * piece + jnp.arange(piece) for n in range(config.pieces)]
    queries = [
        load(q_ref.at[b, h, rows[None], c[:, None]], mask=_rows_mask(c, exists), other=0.0)
        .astype(dtype) for c in channels
    ]  # fmt: skip
    k_group = kw_ref.shape[2] * count // ks_ref.shape[2]
    k_groups = max(WORDS * count // k_group, 1)  # of a tile
    parts, words = parts_of(width, value_bits)
    codes = 32 // value_bits // parts
    v_groups = vs_ref.shape[3]
    places = jnp.arange(parts * words)

    def products(tile, turn):
        """K q^T of the tokens of one turn, f32[WORDS, rows] for each lane."""
        word = tile * WORDS + jnp.arange(WORDS)
        live = (word * count < stop)[:, None]
        group = tile * WORDS * count // k_group + jnp.arange(k_groups)
        known = (group * k_group < stop)[:, None]
        raw = [jnp.zeros((WORDS, config.rows), jnp.float32)] * lanes
        offsets = raw[0]
        for c, q in zip(channels, queries, strict=True):
            w = load(kw_ref.at[b, h, word[:, None], c[None]], mask=live, other=0)
            if turns > 1:
                shift = load(turn_ref.at[turn * WORDS + jnp.arange(WORDS)])
                w = w >> jnp.broadcast_to(shift[:, None], w.shape)
            per_channel, zero = (
                load(ref.at[b, h, group[:, None], c[None]], mask=known, other=0).astype(dtype)
                for ref in (ks_ref, kz_ref)
            )
            unit, offset = (
                _spread(x, WORDS // k_groups) for x in unit_and_offset(per_channel, zero, key_bits)
            )
            offsets += exact_dot(offset, q)
            for lane in range(lanes):
                k = numbers(w, key_bits, lane, unit, interpret=interpret)
                raw[lane] += exact_dot(k, q)
        return [x + offsets for x in raw]

    def scored(x, slot):
        """Scores in units of log 2, where nothing is hidden yet."""
        if softcap is None and not alibi:
            return x * (scale * LOG2E)
        x = x * scale
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        if alibi:
            distance, slopes = alibi
            slope = load(slopes.at[h * groups + rows // size], mask=exists, other=0.0)
            bias = _entries(distance, b, h, slot, rows % size, slot < stop)
            x = x - slope[None] * bias.astype(jnp.float32)
        return x * LOG2E

    def body(n, carry):
        *acc, largest, total = carry
        tile, turn = n // turns, n % turns
        word = tile * WORDS + jnp.arange(WORDS)
        seen = _entries(visible_ref, b, h, word, rows % size, word * count < stop)
        below = jnp.clip(stop - word * count - turn * lanes, 0, lanes)  # tokens of each word
        seen = seen >> (turn * lanes).astype(jnp.uint32)
        found = []
        for lane, x in enumerate(products(tile, turn)):
            x = scored(x, word * count + turn * lanes + lane)
            is_seen = ((seen >> jnp.uint32(lane)) & 1) != 0
            found.append(jnp.where(is_seen & (lane < below)[:, None], x, -jnp.inf))
        top = jnp.maximum(largest, jnp.max(functools.reduce(jnp.maximum, found), axis=0))
        old = exp2(largest - top, interpret=interpret)
        acc, total = [a * old[None] for a in acc], total * old[None]
        for lane, x in enumerate(found):
            p = exp2(x - top[None], interpret=interpret)
            total += p
            w, unit, offset = values(word * count + turn * lanes + lane, tile)
            acc = [
                a + exact_dot(
                    numbers(w, value_bits, code, unit, offset, interpret=interpret), p.astype(dtype)
                )
                for code, a in enumerate(acc)
            ]  # fmt: skip
        return *acc, top, total

    def values(slot, tile):
        """Words of the tokens, one row for each part of them, with their units and offsets."""
        inside = (slot < stop)[:, None]
        w = load(vw_ref.at[b, h, slot[:, None], jnp.arange(words)[None]], mask=inside, other=0)
        w = _repeated(w.T, parts)
        if parts > 1:  # of an index that differs from tile to tile, lest the load leaves the loop
            shift = load(part_ref.at[places + jnp.minimum(tile, 0)])
            w = w >> jnp.broadcast_to(shift[:, None], w.shape)
        group = jnp.arange(v_groups)[None]
        per_token, zero = (
            load(ref.at[b, h, slot[:, None], group], mask=inside, other=0).astype(dtype).T
            for ref in (vs_ref, vz_ref)
        )
        unit, offset = (
            _repeated(_spread(x, words // v_groups), parts)
            for x in unit_and_offset(per_token, zero, value_bits)
        )
        return w, unit, offset

    *acc, largest, total = jax.lax.fori_loop(
        first * turns, last * turns, body,
        (
            *([jnp.zeros((parts * words, config.rows), jnp.float32)] * codes),
            jnp.full((config.rows,), NEGATIVE, jnp.float32),
            jnp.zeros((WORDS, config.rows), jnp.float32),
        ),
    )  # fmt: skip
    for code, found in enumerate(acc):
        channel = (places % words) * (parts * codes) + (places // words) * codes + code
        store(
            acc_ref.at[b, h, split, rows[None], channel[:, None]], found,
            mask=_rows_mask(channel, exists),
        )  # fmt: skip
    largest = jnp.where(largest == NEGATIVE, NEGATIVE, largest / LOG2E)  # nothing was seen
    store(max_ref.at[b, h, split, rows], largest, mask=exists)
    store(sum_ref.at[b, h, split, rows], jnp.sum(total, axis=0), mask=exists)


def _rows_mask(channels, exists):
    return jnp.broadcast_to(exists[None], (channels.shape[0], exists.shape[0]))


def _spread(x, times: int):
    """Every row `times` times, [N * times, M]."""
    n, m = x.shape
    return jnp.broadcast_to(x[:, None], (n, times, m)).reshape(n * times, m)


def _repeated(x, times: int):
    """All rows again and again, [times * N, M]."""
    n, m = x.shape
    return jnp.broadcast_to(x[None], (times, n, m)).reshape(times * n, m)


def _entries(ref, b, h, places, node, inside):
    """Of [B|1, K|1, T|1, S], the entries at `places` for the queries `node`: [places, nodes|1]."""
    b, h = (i if n > 1 else 0 for i, n in ((b, ref.shape[0]), (h, ref.shape[1])))
    if ref.shape[2] == 1:
        return load(ref.at[b, h, 0, places], mask=inside, other=0)[:, None]
    mask = jnp.broadcast_to(inside[:, None], (places.shape[0], node.shape[0]))
    return load(ref.at[b, h, node[None], places[:, None]], mask=mask, other=0)
