"""quantize_pack in plain `jnp`."""

from pallas_kernels.quantization import pack, put_runs, quantize


def quantize_pack(words, scale, zero, x, index, *, bits: int, group: int, axis: int):
    codes, *metadata = quantize(x, bits, group, axis, scale.dtype.name)
    new = (pack(codes, bits, axis), *metadata)
    return tuple(
        put_runs(old, y, index, 2) for old, y in zip((words, scale, zero), new, strict=True)
    )
