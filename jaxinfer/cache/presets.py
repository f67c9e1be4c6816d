"""Cache policies by name, as users choose them.

Every preset is a function that returns a frozen `Policy`; `resolve` also takes the names of the
command line, mappings such as `{"name": "streaming", "window": 252}` and lists with one policy per
layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxinfer.cache.base import PerLayer, Policy
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.heavy import Heavy
from jaxinfer.cache.kivi import Kivi, kivi
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.cache.ring import Ring, Sinks


def full() -> Policy:
    """Keeps every token in full precision: `2 * K * H * itemsize` bytes per token and layer."""
    return Policy(name="full", tiers=(Dense(),))


def streaming(
    sinks: int = 4,
    window: int = 1020,
    *,
    positions: str = "in_cache",
    bits: int | None = None,
    group: int = 32,
    residual: int = 128,
) -> Policy:
    """The first `sinks` and the last `window` tokens, for streams of any length (StreamingLLM,
    arXiv 2309.17453).

    A token sees `sinks + window` others. Distances are counted inside the cache, so that no
    distance exceeds `sinks + window`, which should stay below the model's trained context;
    positions="absolute" counts them in the text (the Lambda mask of LESS). With sinks=0 this is
    plain window attention. With `bits` the window is quantized as by `kivi`, but for its newest
    `residual` tokens and the sinks; it then moves in blocks of `residual` tokens and is rounded
    down to whole blocks.
    """
    if sinks < 0:
        raise ValueError(f"sinks must be 0 or more tokens, got {sinks}")
    if positions not in ("in_cache", "absolute"):
        raise ValueError(f"positions must be 'in_cache' or 'absolute', got {positions!r}")
    first = (Sinks(size=sinks, query_phase=positions),) if sinks else ()
    recent = Ring(size=window, start=sinks)
    if bits is not None:
        blocks = window // residual - 1
        if blocks < 1:
            raise ValueError(
                f"a quantized window of {window} tokens needs two blocks of residual={residual}; "
                "take a larger window or a smaller residual"
            )
        window = (blocks + 1) * residual
        recent = Kivi(
            key_bits=bits,
            value_bits=bits,
            key_group=group,
            value_group=group,
            residual=residual,
            value_flush="block",
            window=blocks * residual,
            start=sinks,
        )
    return Policy(
        name="streaming" if bits is None else f"streaming-kivi{bits}",
        tiers=(*first, recent),
        positions=positions,
        sinks=sinks,
        window=window,
        chunk_invariant=bits is None,
        lossless_under_tree=bits is None,
    )


def h2o(heavy: int | float = 0.1, recent: int | float = 0.1) -> Policy:
    """The last `recent` tokens and, per head, the `heavy` most attended of those before (arXiv
    2306.14048).

    Budgets are tokens (int) or shares of the prompt's bucket (float): "5 % H2O" is
    `h2o(0.025, 0.025)`.
    """
    return Policy(
        name="h2o",
        tiers=(Ring(size=recent, observes=True), Heavy(size=heavy)),
        observe=True,
        chunk_invariant=False,
        lossless_under_tree=False,
    )


def less(base: Policy | str | Mapping[str, Any] = "h2o", kernels: Any = None) -> Policy:
    """`base`, an evicting policy, whose evicted tokens live on in a low-rank state (arXiv
    2402.09398).

    `kernels` are `LessKernels`, or the folder or name of saved ones; None takes those that come
    with the library for the model at hand when it is used by name ("smollm2-135m").
    """
    from jaxinfer.io.less_kernels import LessKernels, load_kernels

    base = resolve(base)
    if isinstance(base, PerLayer):
        layers = tuple(less(policy, kernels) for policy in base.layers)
        return replace(per_layer(layers), kernels=layers[0].kernels)
    if base.tiers and base.tiers[-1].grows:
        raise ValueError(
            f"policy {base.name!r} evicts nothing that LESS could absorb; use it over h2o or "
            "streaming (with bits= for a quantized window)"
        )
    if kernels is None or isinstance(kernels, str | Path):
        kernels = load_kernels("smollm2-135m" if kernels is None else kernels)
    if not isinstance(kernels, LessKernels):
        raise ValueError(f"kernels must be LessKernels or their folder, got {type(kernels)}")
    rank = kernels.config.rank
    # Inside a chunk or a tree what leaves the window is not absorbed yet.
    return replace(
        base,
        name=f"less-{base.name}",
        tiers=(*base.tiers, LowRank(rank=rank)),
        kernels=kernels,
        chunk_invariant=False,
        lossless_under_tree=False,
    )


def per_layer(policies: Sequence[Policy | str | Mapping[str, Any]]) -> Policy:
    """Layer i uses `policies[i]`; it promises what all of them promise."""
    layers = tuple(resolve(policy) for policy in policies)
    if not layers:
        raise ValueError("give one policy per layer, got none")
    return PerLayer(
        name="per-layer",
        layers=layers,
        chunk_invariant=all(policy.chunk_invariant for policy in layers),
        lossless_under_tree=all(policy.lossless_under_tree for policy in layers),
    )


PRESETS: dict[str, Callable[..., Policy]] = {
    "full": full,
    "kivi": kivi,
    "kivi2": kivi,
    "kivi4": lambda **options: kivi(**{"bits": 4, **options}),
    "streaming": streaming,
    "h2o": h2o,
    "less": less,
}


def resolve(policy: Any) -> Policy:
    """A policy from a policy, a preset's name, a mapping with `name` and arguments, a list with one
    of these per layer, or None (full)."""
    if policy is None:
        return full()
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, list | tuple):
        return per_layer(policy)
    arguments = {"name": policy} if isinstance(policy, str) else dict(policy)
    name = arguments.pop("name", None)
    if name not in PRESETS:
        raise ValueError(f"unknown cache policy {name!r}; known policies: {', '.join(PRESETS)}")
    try:
        return PRESETS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"policy {name!r} does not take these arguments: {error}") from None
