"""Cache policies by name, as users choose them.

Every preset is a function that returns a frozen `Policy`; `resolve` also takes the names of the
command line, mappings such as `{"name": "streaming", "window": 252}`, lists with one policy per
layer and files of such lists.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from jaxinfer.arguments import one_of, path_text, shown
from jaxinfer.cache.base import QueryPhase
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.feature_maps import LessFeatureMaps, load_feature_maps
from jaxinfer.cache.heavy import Heavy
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.kivi_preset import kivi
from jaxinfer.cache.lowrank import LowRank
from jaxinfer.cache.policy import PerLayer, Policy
from jaxinfer.cache.policy_file import is_policy_file, read_policy_file
from jaxinfer.cache.ring import Ring, Sinks, check_tokens
from jaxinfer.plugins import Factories

PolicyLike: TypeAlias = (
    Policy | str | Mapping[str, object] | Sequence[Policy | str | Mapping[str, object]] | None
)
"""How users write a policy: itself, a name, a mapping with "name" and arguments, a list with one of
these per layer, or the file of one (NAME.json); None is `full()`."""


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
    arXiv 2309.17453). Both are numbers of tokens: a share has no meaning in an endless stream.

    A token sees `sinks + window` others. Distances are counted inside the cache, so that no
    distance exceeds `sinks + window`, which should stay below the model's trained context;
    positions="absolute" counts them in the text (the Lambda mask of LESS). With sinks=0 this is
    plain window attention. A model trained with a learnable sink token in front of every text
    (section 3.3) has it as its BOS, and sinks=1 suffices; with sink logits
    (`ModelConfig.sink_logits`) it needs none. With `bits` the window is quantized as by `kivi`, but
    for its newest `residual` tokens and the sinks; it then moves in blocks of `residual` tokens and
    is rounded down to whole blocks.
    """
    check_tokens("sinks", sinks, least=0)
    check_tokens("window", window, least=1)
    phase: QueryPhase = one_of("positions", positions, ("in_cache", "absolute"))
    first = (Sinks(size=sinks, query_phase=phase),) if sinks else ()
    recent = Ring(size=window, start=sinks)
    if bits is not None:
        check_tokens("residual", residual, least=1)
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
        positions=phase,
        sinks=sinks,
        window=window,
        prompt="chunks" if bits is None else "whole",
        chunk_invariant=bits is None,
        lossless_under_tree=bits is None,
    )


def h2o(heavy: int | float = 0.1, recent: int | float = 0.1) -> Policy:
    """The last `recent` tokens and, per head, the `heavy` most attended of those before (arXiv
    2306.14048).

    Budgets are tokens (int) or shares of each row's own prompt (float), rounded down to whole
    tokens, at least one: of 65 tokens `h2o(0.1, 0.1)` keeps 6 and 6. "5 % H2O" is
    `h2o(0.025, 0.025)`. In a session, whose text grows, a share is one of the model's context; a
    text that is scored is its own context. The memory is that of the longest prompt, rounded up to
    a power of two.
    """
    return Policy(
        name="h2o",
        tiers=(Ring(size=recent, keeps_weights=True), Heavy(size=heavy)),
        prompt="whole",
        weigh_keys="always",
        chunk_invariant=False,
        lossless_under_tree=False,
    )


def less(
    base: PolicyLike = None,
    feature_maps: LessFeatureMaps | str | Path | None = None,
    *,
    kernels: LessFeatureMaps | str | Path | None = None,
    **options: object,
) -> Policy:
    """`base`, an evicting policy, whose evicted tokens live on in a low-rank state (arXiv
    2402.09398).

    Without `base` it is `h2o(51, 51)`, 5 % of 2048 tokens; `options` are arguments of a base given
    by name: `less("streaming", positions="absolute", window=98)`; budgets may be shares as in
    `h2o`. Of a list with one policy per layer, those that evict get the state. `feature_maps` are
    trained ones, or the folder or name of saved ones; None takes those that come with the library
    ("smollm2-135m"). `kernels` is an older spelling of it.

    Over positions in the text (h2o, and streaming with positions="absolute", on which feature
    maps are trained) a prompt attends to all of itself, as in the paper; over positions in the
    cache it is read in pieces of one window, so that what leaves is absorbed on the way.
    """
    if options and not (base is None or isinstance(base, str)):
        raise ValueError(f"arguments {sorted(options)} need a base policy given by name")
    if base is None:
        base, options = "h2o", {"heavy": 51, "recent": 51} | options
    base = resolve({"name": base, **options} if isinstance(base, str) else base)
    if kernels is not None and feature_maps is not None:
        raise ValueError("feature_maps and its older spelling kernels are both given; give one")
    maps = kernels if feature_maps is None else feature_maps
    if not isinstance(maps, LessFeatureMaps):
        maps = maps if maps is None else path_text("feature_maps", maps)
        maps = load_feature_maps("smollm2-135m" if maps is None else maps)
    layers = base.layers if isinstance(base, PerLayer) else (base,)
    if not any(policy.fixed_size for policy in layers):
        raise ValueError(
            f"policy {base.name!r} evicts nothing that LESS could absorb; use it over h2o or "
            "streaming (with bits= for a quantized window)"
        )
    made = [_absorbing(policy, maps) if policy.fixed_size else policy for policy in layers]
    return per_layer(made) if isinstance(base, PerLayer) else made[0]


def _absorbing(base: Policy, maps: LessFeatureMaps) -> Policy:
    if any(isinstance(tier, LowRank) for tier in base.tiers):
        raise ValueError(f"policy {base.name!r} has a low-rank state already")
    # Inside a chunk or a tree what leaves the window is not absorbed yet.
    return replace(
        base,
        name=f"less-{base.name}",
        tiers=(*base.tiers, LowRank(rank=maps.config.rank)),
        feature_maps=maps,
        prompt="whole",
        max_prefill_chunk=base.window if base.positions == "in_cache" else None,
        chunk_invariant=False,
        lossless_under_tree=False,
    )


def per_layer(policies: Sequence[PolicyLike] | str | Path) -> Policy:
    """Layer i uses `policies[i]`; it promises what all of them promise. `policies` may be the file
    that `jaxinfer diagnose --save` writes."""
    if isinstance(policies, str | Path):
        policies = _of_file(path_text("policies", policies))
    if not isinstance(policies, list | tuple) or not policies:
        raise ValueError(
            f"policies must be a list with one per layer, or a file of one, got {shown(policies)}"
        )
    if any(isinstance(policy, list | tuple) for policy in policies):
        raise ValueError("policies must be a list with one per layer, got lists in it")
    layers = tuple(resolve(policy) for policy in policies)
    if any(isinstance(policy, PerLayer) for policy in layers):
        raise ValueError("a layer has one policy, got a file or list of several for one")
    maps = [policy.feature_maps for policy in layers if policy.feature_maps is not None]
    if any(other.config != maps[0].config for other in maps):
        raise ValueError("all layers with LESS must share one set of feature maps, got several")
    return PerLayer(
        name="per-layer",
        feature_maps=maps[0] if maps else None,
        layers=layers,
        prompt="whole" if any(policy.prompt == "whole" for policy in layers) else "chunks",
        chunk_invariant=all(policy.chunk_invariant for policy in layers),
        lossless_under_tree=all(policy.lossless_under_tree for policy in layers),
        positions="in_cache" if all(p.positions == "in_cache" for p in layers) else "absolute",
    )


def _of_file(path: str) -> list[Policy]:
    """The policies in a file; equal ones are one, as LESS's are read from files of their own."""
    made: dict[str, Policy] = {}
    found = []
    for written in read_policy_file(path):
        key = json.dumps(written, sort_keys=True)
        if key not in made:
            made[key] = resolve(written)
        found.append(made[key])
    return found


POLICIES: Factories[Policy] = Factories(
    "cache policy",
    "policies",
    "jaxinfer.policies",
    Policy,
    {
        "full": full,
        "kivi": kivi,
        "kivi2": kivi,
        "kivi4": partial(kivi, bits=4),
        "streaming": streaming,
        "h2o": h2o,
        "less": less,
    },
)


def register_policy(name: str, factory: Callable[..., Policy]) -> None:
    """Makes a policy of your own known by name, also to the command line of this process.

    An installed package does the same for every process with an entry point of the group
    `jaxinfer.policies` that names the factory.

    Args:
        name: as in `lm.generate(policy=name)` or `{"name": name, ...}`.
        factory: returns a `Policy`; its arguments are those of the mapping.

    Raises:
        ValueError: for a name that is taken.

    Example:
        >>> import jaxinfer as ji
        >>> ji.register_policy("short", lambda window=60: ji.streaming(4, window))
    """
    POLICIES.register(name, factory)


def resolve(policy: PolicyLike) -> Policy:
    """The policy that is meant.

    Raises:
      ValueError: there is no such policy, or it does not take these arguments.
    """
    if policy is None:
        return full()
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, list | tuple):
        return per_layer(policy)
    name = policy.get("name") if isinstance(policy, Mapping) else policy
    if isinstance(name, str) and is_policy_file(name):
        if isinstance(policy, Mapping) and len(policy) > 1:
            raise ValueError(
                f"{shown(name)} has the arguments of its policies in it; give no others"
            )
        return per_layer(name)
    if not isinstance(policy, str | Mapping):
        raise ValueError(
            "policy must be a Policy, a name, a mapping with 'name' and arguments, or a list with "
            f"one per layer, got {shown(policy)}"
        )
    return POLICIES.make(policy)


def policy_of(policy: PolicyLike) -> Policy | None:
    """The policy that is meant; None is left to those who have a default of their own.

    Raises:
      ValueError: there is no such policy, or it does not take these arguments.
    """
    return None if policy is None else resolve(policy)
