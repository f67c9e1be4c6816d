"""Attention of one token per row over dense and packed caches, and its peers in jax.

A key or value of `bits` bits costs `H * (bits / 8 + 4 / 32)` bytes with float16 scale and minimum
of each 32 numbers, in bfloat16 `2 H`. Peers: our references as XLA compiles them, and
`jax.nn.dot_product_attention` of cuDNN, which wants another layout.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu.correctness_part import attention, stored
from bench.gpu.rows import Run
from bench.gpu.timing import Timed, filled

GROUP = 32
MODELS = {"llama-2-7b": (32, 1, 128), "llama-3-8b": (8, 4, 128)}  # K, G, H
TINY = {"tiny": (2, 2, 64)}
SHAPES = (  # (batch, slots), most telling first
    (1, 32768), (8, 32768), (1, 4096), (1, 131072), (8, 4096), (8, 131072), (64, 4096), (64, 32768),
    (64, 131072),
)  # fmt: skip
TINY_SHAPES = ((1, 256),)
BITS = (2, None, 4, 8)  # None: bfloat16


def steps(run: Run) -> list[Timed]:
    """All kernels, then the peers."""
    kernels = [timed(run, *shape, bits, run.kernel) for shape in shapes(run) for bits in BITS]
    peers = [
        timed(run, *shape, bits, "reference") for shape in shapes(run) for bits in (2, None)
    ]  # fmt: skip
    cudnn = [timed(run, *shape, None, "cudnn") for shape in shapes(run)]
    rest = [timed(run, *shape, bits, "reference") for shape in shapes(run) for bits in (4, 8)]
    return [*kernels, *cudnn, *peers, *rest]


def shapes(run: Run) -> Iterator[tuple[str, int, int]]:
    """(model, batch, slots)."""
    for batch, slots in TINY_SHAPES if run.quick else SHAPES:
        for model in TINY if run.quick else MODELS:
            yield model, batch, slots


def config_of(part: str, model: str, batch: int, slots: int, bits: int | None, peer: str):
    op = "dense_attention" if bits is None else f"kivi_attention {bits} bits"
    shape = {"model": model, "batch": batch, "slots": slots}
    return {"part": part, "op": op, "peer": peer} | shape


def moved(heads: int, width: int, batch: int, slots: int, bits: int | None) -> float:
    """Bytes of the keys and values."""
    number = 2 if bits is None else bits / 8 + 2 * 2 / GROUP
    return 2 * batch * heads * slots * width * number


def timed(run: Run, model: str, batch: int, slots: int, bits: int | None, peer: str) -> Timed:
    heads, groups, width = (MODELS | TINY)[model]

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
        acc, peak, norm = attention(q, keys, values, bits=bits, name=peer)
        return state, (acc / norm[..., None], peak)

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
