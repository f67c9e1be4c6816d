"""Feed-forward blocks of which a part is read, and products with weights of 4, 8 and 16 bits.

`sparse_mlp` reads `3 * density * F * D` weights of 2 bytes, the dense block of XLA all of them.
`weight_matmul` reads `O * I` codes of 4 or 8 bits and, for each 64 inputs, a scale of 2 bytes and,
at 4 bits, a zero point of 1. Of 16 bits the kernel is `skinny_matmul`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu.rows import Run
from bench.gpu.timing import Timed, filled
from pallas_kernels.skinny_matmul import feed_forward_hidden, skinny_matmul
from pallas_kernels.sparse_mlp import sparse_mlp
from pallas_kernels.sparse_mlp.cases import BLOCKS, TINY_BLOCKS
from pallas_kernels.weight_matmul import QuantizedWeight, weight_matmul
from pallas_kernels.weight_matmul.cases import PRODUCTS, ROWS, TINY_PRODUCTS
from pallas_kernels.weight_matmul.reference import words_of

BLOCK, GROUP = 32, 64
DENSITIES = (1.0, 0.5, 0.25, 0.1)


def steps(run: Run) -> list[Timed]:
    blocks = TINY_BLOCKS if run.quick else BLOCKS
    products = TINY_PRODUCTS if run.quick else PRODUCTS
    made = []
    for d, f in blocks:
        for rows in ROWS:
            made += [mlp(run, rows, d, f, density, "kernel") for density in DENSITIES]
            made += [mlp(run, rows, d, f, 1.0, peer) for peer in ("xla dense", "skinny dense")]
    for inputs, outputs in products:
        for rows in ROWS:
            made += [product(run, rows, inputs, outputs, bits, "kernel") for bits in (4, 8, 16)]
            made.append(product(run, rows, inputs, outputs, 16, "xla bfloat16"))
    made += [
        product(run, rows, *products[0], bits, "reference") for rows in ROWS for bits in (4, 8)
    ]
    made += [mlp(run, 1, *blocks[0], density, "reference") for density in (0.5, 0.1)]
    return made


def mlp(
    run: Run, rows: int, d: int, f: int, density: float, peer: str, config: Any = None
) -> Timed:
    total = f // BLOCK
    live = max(round(total * density), 1)

    def inputs(seed: Any) -> tuple[tuple, tuple]:
        x = filled(seed, (rows, d), jnp.bfloat16)
        weights = [filled(seed + i, (f, d), jnp.bfloat16, d**-0.5) for i in (1, 2)]
        shape = (d, f) if peer == "skinny dense" else (f, d)
        weights.append(filled(seed + 3, shape, jnp.bfloat16, d**-0.5))
        # every list of blocks is another one; which they are is no matter of speed
        blocks = (jnp.arange(total, dtype=jnp.int32) + seed.astype(jnp.int32)) % total
        return (), (x, *weights, jnp.sort(blocks[:live]) if live < total else jnp.arange(total))

    def call(state: tuple, x: Any, gate: Any, up: Any, down: Any, blocks: Any) -> tuple:
        if peer == "xla dense":
            hidden = jax.nn.silu(_dot(x, gate)) * _dot(x, up)
            return state, jnp.dot(
                hidden.astype(down.dtype), down, preferred_element_type=jnp.float32
            )
        if peer == "skinny dense":
            form: Any = {"config": config, "implementation": run.kernel}
            hidden = feed_forward_hidden(x, up, gate, activation="silu", **form)
            return state, skinny_matmul(hidden, [down], **form)[0]
        name: Any = run.kernel if peer == "kernel" else peer
        count = jnp.asarray(live, jnp.int32)
        return state, sparse_mlp(
            x, gate, up, down, blocks, count, block_size=BLOCK, activation="silu",
            config=config, implementation=name,
        )  # fmt: skip

    shape = {"rows": rows, "width": d, "neurons": f, "density": density}
    return Timed(
        config={"part": "weights", "op": "sparse_mlp", "peer": peer} | shape,
        suite=run, inputs=inputs, call=call, bytes=3.0 * live * BLOCK * d * 2,
        slow=5 if peer == "reference" else 1,
    )  # fmt: skip


def product(run: Run, rows: int, i: int, o: int, bits: int, peer: str, config: Any = None) -> Timed:
    def inputs(seed: Any) -> tuple[tuple, tuple]:
        x = filled(seed, (rows, i), jnp.bfloat16)
        if bits == 16:
            return (), (x, filled(seed + 1, (o, i), jnp.bfloat16))
        shape = (i // GROUP, o)
        zero = None if bits == 8 else jnp.full(shape, 8, jnp.uint8)
        scale = jnp.abs(filled(seed + 1, shape, jnp.bfloat16, 0.01))
        codes = filled(seed + 2, (i, words_of(o, bits)), jnp.uint32)
        return (), (
            x,
            QuantizedWeight(codes=codes, scale=scale, zero=zero, bits=bits, group=GROUP, outputs=o),
        )

    def call(state: tuple, x: Any, weight: Any) -> tuple:
        if peer.startswith("xla"):
            return state, _dot(x, weight)
        name: Any = run.kernel if peer == "kernel" else peer
        if bits == 16:
            return state, skinny_matmul(x, [weight], config=config, implementation=name)[0]
        return state, weight_matmul(x, weight, config=config, implementation=name)

    per_group = {4: 3, 8: 2, 16: 0}[bits]
    return Timed(
        config={"part": "weights", "op": f"weight_matmul {bits} bits", "peer": peer,
                "rows": rows, "inputs": i, "outputs": o},
        suite=run, inputs=inputs, call=call,
        bytes=o * i * (bits / 8 + per_group / GROUP) + rows * (2 * i + 4 * o),
        slow=10 if peer == "reference" else 1,
    )  # fmt: skip


def _dot(x: Any, w: Any) -> Any:
    """x w.T in float32."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
