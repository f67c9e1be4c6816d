"""Attention of one token per row over dense and packed caches, and its peers in jax.

A key or value of `bits` bits costs `H * (bits / 8 + 4 / 32)` bytes with float16 scale and minimum
of each 32 numbers, in bfloat16 `2 H`. Peers: our references as XLA compiles them, and
`jax.nn.dot_product_attention` of cuDNN, which wants another layout.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu.correctness_part import attention, stored
from bench.gpu.rows import Run
from bench.gpu.timing import Timed, filled
from pallas_kernels.cases import MODELS, TINY_MODELS, decode_shapes
from pallas_kernels.dense_attention import key_weights
from pallas_kernels.sparse_heads import sparse_heads

GROUP = 32
FIRST = 10  # shapes of both models
BITS = (2, None, 4, 8)  # None: bfloat16


def steps(run: Run) -> list[Timed]:
    """The first shapes with all peers, then the kernels on the others, then their peers."""
    every = list(decode_shapes(run.quick))
    first, others = every[:FIRST], every[FIRST:]
    order = [
        (first, (2, None), run.kernel), (first, (None,), "cudnn"), (first, (4, 8), run.kernel),
        (first, (2, None), "reference"), (others, BITS, run.kernel), (others, (None,), "cudnn"),
        (others, (2, None), "reference"), (every, (4, 8), "reference"),
    ]  # fmt: skip
    return [
        timed(run, *shape, bits, peer)
        for some, widths, peer in order
        for shape in some
        for bits in widths
    ]


def config_of(part: str, model: str, batch: int, slots: int, bits: int | None, peer: str):
    op = "dense_attention" if bits is None else f"kivi_attention {bits} bits"
    shape = {"model": model, "batch": batch, "slots": slots}
    return {"part": part, "op": op, "peer": peer} | shape


def moved(heads: int, width: int, batch: int, slots: int, bits: int | None) -> float:
    """Bytes of the keys and values."""
    number = 2 if bits is None else bits / 8 + 2 * 2 / GROUP
    return 2 * batch * heads * slots * width * number


def timed(
    run: Run, model: str, batch: int, slots: int, bits: int | None, peer: str, config: Any = None
) -> Timed:
    """The step of a peer; `config` is the tiling of the kernel, None its own choice."""
    heads, groups, width = (MODELS | TINY_MODELS)[model]

    def inputs(seed: Any) -> tuple[tuple, tuple]:
        q = filled(seed, (batch, heads, groups, 1, width), jnp.bfloat16)
        if peer == "cudnn":
            shape = (batch, slots, heads, width)
            k, v = (filled(seed + i, shape, jnp.bfloat16) for i in (1, 2))
            return (), (q.reshape(batch, 1, heads * groups, width), k, v)
        return (), (q, *stored((batch, heads, slots, width), bits, GROUP, seed=seed))

    def call(state: tuple, q: Any, keys: Any, values: Any) -> tuple[tuple, Any]:
        if peer == "cudnn":
            return state, jax.nn.dot_product_attention(q, keys, values, implementation="cudnn")
        acc, top, total = attention(q, keys, values, bits=bits, name=peer, config=config)
        return state, (acc / total[..., None], top)

    return Timed(
        config=config_of(
            "attention", model, batch, slots, bits, "kernel" if peer == run.kernel else peer
        ),
        suite=run,
        inputs=inputs,
        call=call,
        bytes=moved(heads, width, batch, slots, bits),
        slow=10 if peer == "reference" else 1,
    )


def half_of_heads(
    run: Run, model: str, batch: int, slots: int, peer: Any, config: Any = None
) -> Timed:
    """Over every other key/value head; as `attn_weight`, no step of the suite, but of the search
    for tilings."""
    heads, groups, width = (MODELS | TINY_MODELS)[model]
    half = heads // 2

    def inputs(seed: Any) -> tuple[tuple, tuple]:
        q = filled(seed, (batch, heads, groups, width), jnp.bfloat16)
        stored_ones = stored((batch, heads, slots, width), None, seed=seed)
        first = jnp.arange(batch)[:, None] + seed.astype(jnp.int32)
        return (), (q, *stored_ones, (first + 2 * jnp.arange(half)) % heads)

    def call(state: tuple, q: Any, keys: Any, values: Any, chosen: Any) -> tuple[tuple, Any]:
        length, count = jnp.full(batch, slots), jnp.full(batch, half)
        return state, sparse_heads(
            q, keys, values, length, chosen, count, scale=width**-0.5, config=config,
            implementation=peer,
        )  # fmt: skip

    form = {"op": "sparse_heads", "model": model, "batch": batch, "slots": slots, "peer": peer}
    size = moved(half, width, batch, slots, None)
    return Timed(config=form, suite=run, inputs=inputs, call=call, bytes=size)


def attn_weight(
    run: Run, model: str, batch: int, slots: int, peer: Any, config: Any = None
) -> Timed:
    """The probability that every key receives."""
    heads, groups, width = (MODELS | TINY_MODELS)[model]

    def inputs(seed: Any) -> tuple[tuple, tuple]:
        q = filled(seed, (batch, heads, groups, 1, width), jnp.bfloat16)
        keys = filled(seed + 1, (batch, heads, slots, width), jnp.bfloat16)
        return (), (q, keys, filled(seed + 2, q.shape[:-1], jnp.float32) + 3)

    def call(state: tuple, q: Any, keys: Any, lse: Any) -> tuple[tuple, Any]:
        visible = jnp.ones((1, 1, 1, slots), bool)
        return state, key_weights(
            q, keys, visible, lse, scale=width**-0.5, config=config, implementation=peer
        )

    form = {"op": "key_weights", "model": model, "batch": batch, "slots": slots, "peer": peer}
    size = batch * heads * slots * (2.0 * width + 4)
    return Timed(config=form, suite=run, inputs=inputs, call=call, bytes=size)
