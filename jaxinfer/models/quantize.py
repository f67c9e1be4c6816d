"""A model's parameters with its weights in 8 or 4 bits."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfer.arguments import of_kind, shown
from jaxinfer.config import ModelConfig
from jaxinfer.cpu_kernels.loading import say_once_if_missing
from jaxinfer.models.calibrate import NO_SMOOTHING, Smoothing, calibration_tokens, smoothing
from jaxinfer.models.fingerprint import fingerprint
from jaxinfer.models.params import is_weight
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import Int8Weight, PackedWeight, StoredWeight, rounded_to_int8
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Params, Tokenizer

FORMATS = {"int8": 8, "int4": 4}
GROUPS = (64, 32, 16)  # inputs that share a scale: the largest that divides them


def quantize_params(
    cfg: ModelConfig,
    params: Params,
    weights: str,
    *,
    tokenizer: Tokenizer | None = None,
    backend: Backend | None = None,
) -> Params:
    """The same model with the weights of its layers and its head in `weights`.

    On a GPU, and on a CPU for int4, they have the form of the kernel `weight_matmul`; int8 on
    a CPU is `Int8Weight`, smoothed by the model's activations on a short text
    (`jaxinfer.models.calibrate`; random tokens without a tokenizer). Norms and biases stay as they
    are, and so does an embedding that is no head, of which a step reads a few rows. Sparse blocks
    (`jaxinfer.sparsity.mlp`) become int8 on a CPU like dense ones; otherwise they stay too, as
    their kernel reads floating weights.
    The head has 8 bits in every format, since it suffers most (GGUF's 4-bit files do the same).

    Raises:
      ValueError: an unknown format, or a weight whose inputs no group divides.
    """
    check_format(weights)
    of_kind("cfg", cfg, ModelConfig, "a ModelConfig")
    if not isinstance(params, Mapping) or not {"embed", "layers"} <= set(params):
        raise ValueError(f"params must be a model's parameters, got {shown(params)}")
    origin, smooth = fingerprint(params), NO_SMOOTHING
    if weights == "int8" and not _for_kernels(backend):
        say_once_if_missing()
        params, smooth = smoothing(cfg, params, calibration_tokens(cfg, tokenizer))
    return quantize_weights(params, weights, backend, smooth=smooth, origin=origin)


def quantize_weights(
    params: Params,
    weights: str,
    backend: Backend | None = None,
    *,
    smooth: Smoothing = NO_SMOOTHING,
    origin: str = "",
) -> Params:
    """`quantize_params` of any tree with weights, given the factors of `smoothing`."""
    check_format(weights)
    tied, packed = "head" not in params, weights == "int4" or _for_kernels(backend)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, FeedForward):
            dense = None if packed else leaf.as_dense()
            return leaf if dense is None else leaf.holding(all_of(dense, path))
        top = getattr(path[0], "key", None)
        is_head = top == "head" or (tied and top == "embed")
        if isinstance(leaf, StoredWeight) or not is_weight(path) or (top == "embed" and not tied):
            return leaf
        identity, where = {"dtype": str(leaf.dtype), "origin": origin}, jax.tree_util.keystr(path)
        if not packed:
            own = smooth.own.get(where)
            codes, scale = _int8(leaf, smooth.divided.get(where, own))
            return Int8Weight(codes=codes, scale=scale, smooth=own, **identity)
        bits = 8 if is_head else FORMATS[weights]
        group = next((size for size in GROUPS if leaf.shape[1] % size == 0), None)
        if group is None:
            raise ValueError(
                f"weights={weights!r} takes weights whose inputs are a multiple of 16, "
                f"params{where} has {leaf.shape[1]}; load this model without weights="
            )
        stored = _packed(leaf, bits, group)
        return PackedWeight(packed=stored, **identity)

    def all_of(tree: Params, path: tuple[Any, ...] = ()) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda rest, leaf: one((*path, *rest), leaf),
            tree,
            is_leaf=lambda x: isinstance(x, StoredWeight | FeedForward),
        )

    return all_of(params)


def check_format(weights: str) -> None:
    """Raises unless `weights` names a format."""
    if not isinstance(weights, str) or weights not in FORMATS:
        raise ValueError(f"weights must be 'int8' or 'int4', or None, got {shown(weights)}")


def _for_kernels(backend: Backend | None) -> bool:
    return (backend or Backend.of()).layout == "BKSH"


@jax.jit
def _int8(weight: Array, smooth: Array | None) -> tuple[Array, Array]:
    wide = weight.astype(jnp.float32)
    return rounded_to_int8(wide if smooth is None else wide * smooth)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _packed(weight: Array, bits: int, group: int) -> Any:
    from pallas_kernels.weight_matmul import quantize_weight

    return quantize_weight(weight, bits, group)
