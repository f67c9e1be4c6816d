"""What `cases.py` of a kernel's folder is made of, and all of them together.

A kernel's `cases.py` has three dictionaries by the name of an operation:

- `CASES`: typical uses as shapes, which `tools/kernels/inspect_kernels.py` compiles;
- `PROBLEMS`: random arguments and how far from exact the results may be, which the benchmark suite
  puts to the kernel on a GPU;
- `TUNED`: the uses that `tools/kernels/tune_kernels.py` tries tilings on.

Tolerances are relative to the largest magnitude of an output, a few times the largest error that an
H200 showed (`bench/results/gpu/suite.jsonl`). Float32 operands are multiplied as such (5e-6 for
5.6e-7: the order of sums over thousands of keys); bfloat16 ones are rounded on the way, as in the
kernels' tests (1.5e-2 for 7.1e-3, two roundings of 2**-8 and those of the weights).
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kivi_attention.api import PackedHalf
from pallas_kernels.quantization import pack, quantize
from pallas_kernels.softmax_state import NEGATIVE, ExtraKeys, Partial

FOLDERS = (
    "dense_attention", "kivi_attention", "quantize_pack", "put_tokens", "sparse_mlp",
    "sparse_heads", "skinny_matmul", "weight_matmul", "less_state", "modal_step", "add_norm",
    "kivi_push",
)  # fmt: skip
Rng = np.random.Generator

# Decode steps of attention: K, G, H of models, then (batch, slots), most telling first.
MODELS = {"llama-2-7b": (32, 1, 128), "llama-3-8b": (8, 4, 128)}
TINY_MODELS = {"tiny": (2, 2, 64)}
DECODE_SHAPES = (
    (1, 32768), (8, 32768), (1, 4096), (1, 131072), (8, 4096), (8, 131072), (64, 4096), (64, 32768),
    (64, 131072),
)  # fmt: skip
TINY_SHAPES = ((1, 256),)
MOST_TOKENS = 2**18  # of a tuned batch: the reference makes all codes float32 numbers at once


@dataclass(frozen=True, kw_only=True)
class Case:
    """One use of a kernel. `launch` is the name that it is launched by (default: its operation)."""

    config: str
    function: Callable[..., Any]
    args: tuple[Any, ...]  # trees of ShapeDtypeStruct
    operations: int
    bytes: int | None = None  # default: all of `args` and of the results, once
    launch: str | None = None


@dataclass(kw_only=True)
class Problem:
    """`run(*args, implementation=...)`; with `widens` the reference gets its floats in float32."""

    run: Callable[..., Any]
    args: tuple
    tolerance: float
    widens: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


def same(results: Any) -> Any:
    return results


@dataclass(frozen=True, kw_only=True)
class TunedUse:
    """One use of a kernel that is worth an entry in `tuned/`: `sizes` are keywords of the timed
    step, whose results, as `view` shows them, may differ from the reference's by `tolerance`."""

    kernel: str
    candidates: Callable[..., list[Any]]
    tolerance: float
    sizes: dict[str, Any] = field(default_factory=dict)
    view: Callable[[Any], Any] = same


def every(kind: str) -> dict[str, Any]:
    """One of "CASES", "PROBLEMS", "TUNED" of all kernels."""
    found: dict[str, Any] = {}
    for folder in FOLDERS:
        found |= getattr(importlib.import_module(f"pallas_kernels.{folder}.cases"), kind)
    return found


def array(*shape: int, dtype: str = "bfloat16") -> Any:
    """A shape that stands for an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def packed_shapes(b: int, k: int, slots: int, h: int, bits: int, axis: int, group: int = 32) -> Any:
    """Keys (axis 2) or values (axis 3) in groups of 32."""
    words, groups = [b, k, slots, h], [b, k, slots, h]
    words[axis] //= 32 // bits
    groups[axis] //= group
    scale = array(*groups, dtype="float16")
    return PackedHalf(array(*words, dtype="uint32"), scale, scale)


def decode_shapes(quick: bool) -> Iterator[tuple[str, int, int]]:
    """(model, batch, slots)."""
    for batch, slots in TINY_SHAPES if quick else DECODE_SHAPES:
        for model in TINY_MODELS if quick else MODELS:
            yield model, batch, slots


def tuned_shapes(quick: bool) -> Iterator[dict[str, Any]]:
    """Those of which the reference has room for all."""
    for model, batch, slots in decode_shapes(quick):
        if batch * slots <= MOST_TOKENS:
            yield {"model": model, "batch": batch, "slots": slots}


def queries(rng: Rng, quick: bool, sizes: tuple[int, ...], most: int = 6):
    """q [B, K, G, T, H], its dtype and shape."""
    b, k, g = (int(rng.integers(1, high)) for high in ((3, 3, 3) if quick else (5, 9, 6)))
    shape = (b, k, g, int(rng.integers(1, most + 1)), int(rng.choice(sizes)))
    dtype = rng.choice(["float32", "bfloat16"])
    return some(rng, dtype, *shape), dtype, shape


def some_slots(rng: Rng, quick: bool) -> int:
    return int(rng.integers(100, 200 if quick else 3000))


def masks(rng: Rng, shape: tuple[int, ...], s: int):
    """visible, distance, stop and the form of the scores."""
    b, k, g, t, h = shape
    visible = jnp.asarray(rng.random((b, 1, t, s)) < rng.choice([0.5, 1.0]))
    spec: dict[str, Any] = {
        "scale": float(h**-0.5),
        "softcap": 20.0 if rng.random() < 0.5 else None,
    }
    distance = None
    if rng.random() < 0.3:
        distance = jnp.asarray(rng.integers(0, 60, (b, 1, t, s)), jnp.int32)
        spec["slopes"] = tuple(rng.uniform(0.01, 0.3, k * g).tolist())
    return visible, distance, jnp.asarray(rng.integers(1, s + 1, b), jnp.int32), spec


def extra_keys(rng: Rng, q: Any, dtype: Any) -> ExtraKeys | None:
    """Nothing, or a few fresh keys of which some are hidden, perhaps with a state of others."""
    if rng.random() < 0.3:
        return None
    b, k, _, _, h = q.shape
    fresh = int(rng.integers(1, 9))
    hidden = rng.random((*q.shape[:-1], fresh)) < 0.3
    scores = jnp.where(hidden, NEGATIVE, 3 * rng.normal(size=hidden.shape))
    state = None
    if rng.random() < 0.5:
        state = Partial(
            some(rng, "float32", *q.shape), some(rng, "float32", *q.shape[:-1]),
            jnp.asarray(rng.uniform(1, 9, q.shape[:-1]), jnp.float32),
        )  # fmt: skip
    return ExtraKeys(scores.astype(jnp.float32), some(rng, dtype, b, k, fresh, h), state)


def some(rng: Rng, dtype: Any, *shape: int):
    return jnp.asarray(rng.normal(size=shape), dtype)


def tolerance_of(dtype: Any) -> float:
    return 5e-6 if dtype == "float32" else 1.5e-2


def facts_of(q: Any, **more: Any) -> dict[str, Any]:
    return {"shape": list(q.shape)} | {name: str(x) for name, x in more.items()}


def packed_half(x: np.ndarray, bits: int, group: int, axis: int) -> PackedHalf:
    codes, scale, zero = quantize(jnp.asarray(x, jnp.float32), bits, group, axis, "float16")
    return PackedHalf(pack(codes, bits, axis), scale, zero)
