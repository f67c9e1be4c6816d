"""The flush of a quantized cache (KIVI, arXiv 2402.02750, section 3.1, Algorithm 1), in place.

    zero = min x,   scale = (max x - min x) / (2**bits - 1),   code = round((x - zero) / scale)

One launch reads the tokens once and writes words, scales and minima where they belong; XLA would
make each of the three an array of its own and scatter it.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.kivi_attention.api import PackedHalf, check_half
from pallas_kernels.quantize_pack import reference
from pallas_kernels.quantize_pack.configs import Config
from pallas_kernels.shapes import expect
from pallas_kernels.tuned import choose


def quantize_pack(
    half: PackedHalf,
    x: Float[Array, "B K N H"],
    index: Array,
    *,
    bits: int,
    per_channel: bool,
    config: Config | None = None,
    implementation: Implementation | None = None,
) -> PackedHalf:
    """`half` with M runs of N / M tokens written at run `index[b, m]` (i32[B, M]) of each row.

    `per_channel` is the form of keys, else that of values (see `PackedHalf`). An index outside of
    what there is room for writes nothing; no two runs of a row may have the same. The buffers of
    `half` are taken over where the caller gives them up (donation).
    """
    batch, heads, tokens, width = x.shape
    expect("index", index, (batch, None))
    group = check_half("half", half, bits, (batch, heads), 0, width, token_words=per_channel)
    run = tokens // index.shape[1] if index.shape[1] and tokens % index.shape[1] == 0 else 0
    whole = run % group == 0 if per_channel else run & (run - 1) == 0
    if not run or not whole:
        unit = f"multiples of {group} tokens" if per_channel else "a power of two of tokens"
        raise ValueError(f"runs must be {unit}, got {tokens} tokens in {index.shape[1]} runs")
    spec = {"bits": bits, "group": group, "axis": 2 if per_channel else 3}
    sizes = {"batch": batch, "heads": heads, "runs": index.shape[1], "run": run, "width": width}
    config = config or choose("quantize_pack", Config, **sizes, **spec)
    written = dispatch(
        implementation,
        functools.partial(reference.quantize_pack, **spec),
        functools.partial(_quantize_pack, config=config, **spec),
        *half, x, index.astype(jnp.int32),
    )  # fmt: skip
    return PackedHalf(*written)


def _quantize_pack(*args, **options):
    from pallas_kernels.quantize_pack import triton  # a CPU never pays for Pallas

    return triton.quantize_pack(*args, **options)
