"""The decoder-only transformer: embed, blocks, unembed, and the commit of what a call added.

Pure functions over (config, parameters, tokens, cache). Layers are a Python loop: one array per
layer, nothing sliced, nothing copied. `embed`, `blocks` and `unembed` are separate so that a
pipeline stage can run a part of them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Geometry
from jaxinfer.cache.context import CommitContext, StepContext, chain_context
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.config import ModelConfig
from jaxinfer.models.mixers import mixer_of, mixers_of
from jaxinfer.models.offload import fetched
from jaxinfer.models.params import abstract_params
from jaxinfer.models.reach import check_positions
from jaxinfer.nn.divided import gathered, looked_up, summed
from jaxinfer.nn.linear import product
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.nn.norm import add_norm, norm, undivided
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params

Mlp = Callable[[ModelConfig, Params, Array, int], Array]
NO_CACHE = Policy(name="none")


class Output(NamedTuple):
    """`logits` f32 [B, T, V] ("last": [B, 1, V], "none": None), `hidden` [B, T, D] after the final
    norm, `fresh` per layer: all that is not committed, so `cache.pending` and the T tokens."""

    logits: Leaf
    hidden: Leaf
    fresh: tuple[Leaf, ...]


def init_cache(
    cfg: ModelConfig,
    params: Params,
    policy: Policy,
    batch: int,
    capacity: int,
    dtype: str = "float32",
    backend: Backend | None = None,
    contexts: Sequence[int] | None = None,
) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` tokens.

    Budgets that are shares are those of `contexts[b]` tokens in row b; None: of as many as the
    policy was sized for.
    """
    geometry = cache_geometry(cfg, capacity, dtype, backend)
    policies = layer_policies(cfg, policy, params)
    check_cache(cfg, policy, geometry, params)
    layers = tuple(
        mixer_of(layer)[1].init(cfg, one, geometry, batch)
        for layer, one in zip(params["layers"], policies, strict=True)
    )
    if contexts is not None:
        rows = zip(mixers_of(cfg), policies, layers, strict=True)
        layers = tuple(mixer.budgeted(one, state, contexts) for mixer, one, state in rows)
    return Cache(
        length=jnp.zeros((batch,), jnp.int32),
        layers=layers,
        policies=policies,
        backend=geometry.backend,
    )


def layer_policies(
    cfg: ModelConfig, policy: Policy, params: Params | None = None
) -> tuple[Policy, ...]:
    """How each layer keeps its state under the policy; `params` where layers may keep more for
    themselves, such as the inputs of deferred heads."""
    policies = policy.layer_policies(cfg.num_layers)
    params = abstract_params(cfg) if params is None else params
    found = []
    for layer, one in zip(params["layers"], policies, strict=True):
        name, mixer = mixer_of(layer)
        found.append(mixer.policy(cfg, layer[name], one))
    return tuple(found)


def check_cache(
    cfg: ModelConfig, policy: Policy, geometry: Geometry, params: Params | None = None
) -> None:
    """Refuses, with the remedy, a policy that cannot serve the model."""
    pairs = zip(mixers_of(cfg), layer_policies(cfg, policy, params), strict=True)
    for mixer, one in dict.fromkeys(pairs):
        mixer.check(cfg, one, geometry)


def cache_bytes_per_row(
    cfg: ModelConfig, policy: Policy, geometry: Geometry, params: Params | None = None
) -> int:
    """Bytes of all layers' states of one row; `params` as in `layer_policies`."""
    pairs = zip(mixers_of(cfg), layer_policies(cfg, policy, params), strict=True)
    return sum(mixer.bytes_per_row(cfg, one, geometry) for mixer, one in pairs)


def can_truncate(cfg: ModelConfig, policy: Policy, params: Params) -> bool:
    """Whether a row of the cache is cut to its first tokens by setting its length."""
    pairs = zip(mixers_of(cfg), layer_policies(cfg, policy, params), strict=True)
    return all(mixer.truncates and one.can_truncate for mixer, one in pairs)


def grow_cache(cfg: ModelConfig, cache: Cache, capacity: int) -> Cache:
    """A cache that can hold `capacity` tokens a row; states of fixed size stay as they are."""
    layers = zip(mixers_of(cfg), cache.policies, cache.layers, strict=True)
    return replace(
        cache, layers=tuple(mixer.grow(policy, state, capacity) for mixer, policy, state in layers)
    )


def cache_geometry(
    cfg: ModelConfig,
    capacity: int,
    dtype: str = "float32",
    backend: Backend | None = None,
) -> Geometry:
    """One layer's cache geometry; `backend` None is `Backend.of()`."""
    return Geometry(
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        capacity=capacity,
        dtype=str(jnp.dtype(dtype)),
        backend=backend or Backend.of(),
    )


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    cache: Cache | None = None,
    ctx: StepContext | None = None,
    *,
    mlp: Mlp | None = None,
    logits: Literal["all", "last", "none"] = "all",
) -> Output:
    """Reads `tokens` after what `cache` holds (None: nothing) and writes nothing.

    Without `ctx` the tokens are a chain and all valid. "last" gives the logits of each row's last
    valid token. Without a cache this is the plain causal forward of training.
    """
    batch, size = tokens.shape
    if cache is None:
        check_positions(cfg, size)
        empty = jnp.zeros((batch,), jnp.int32)
        cache = Cache(
            length=empty, layers=((),) * cfg.num_layers, policies=(NO_CACHE,) * cfg.num_layers
        )
    if ctx is None:
        ctx = chain_context(cache.length, jnp.full((batch,), size, jnp.int32), size)
    x = embed(cfg, params, tokens, ctx)
    x, fresh = blocks(cfg, params, cache, x, ctx, mlp=mlp)
    hidden = norm(params["final_norm"], x, kind=cfg.norm, eps=cfg.norm_eps)
    if logits == "none":
        return Output(None, hidden, fresh)
    wanted = hidden
    if logits == "last":
        last = jnp.maximum(ctx.valid.sum(axis=1) - 1, 0)
        wanted = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return Output(unembed(cfg, params, wanted, cache.backend), hidden, fresh)


def embed(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"], ctx: StepContext
) -> Float[Array, "B T D"]:
    """Token embeddings, plus learned positions where the model has them."""
    x = looked_up(params["embed"]["tokens"], tokens, ctx.backend)
    if cfg.positions == "learned":
        x = x + params["embed"]["positions"][ctx.positions + cfg.position_offset]
    return x


def blocks(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    x: Float[Array, "B T D"],
    ctx: StepContext,
    *,
    layers: range | None = None,
    mlp: Mlp | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Leaf, ...]]:
    """Runs the layers (or the run `layers`); `params` and `cache` hold just those layers. `mlp`
    (default: `feed_forward`) is called with (config, the block's parameters, x, layer).

    Blocks that select what they compute may do so by what is known earlier: `sites` are the
    embeddings and then the input of every block, attention and feed-forward in turn, without what
    8-bit weights divided into its norm.
    """
    layers = range(cfg.num_layers) if layers is None else layers
    ctx = replace(ctx, backend=cache.backend)
    normed_sum = functools.partial(add_norm, kind=cfg.norm, eps=cfg.norm_eps, backend=cache.backend)
    prepared: dict[tuple[str, Policy], Any] = {}
    fresh, added = [], None  # what the last block adds to x
    sites = [x]
    pending = cache.pending or (None,) * len(layers)
    for index, layer, state, policy, waiting in zip(
        layers, params["layers"], cache.layers, cache.policies, pending, strict=True
    ):
        name, mixer = mixer_of(layer)
        if (name, policy) not in prepared:
            prepared[name, policy] = mixer.prepare(cfg, policy, ctx)
        with jax.named_scope(f"layer{index}"):
            layer = fetched(layer)
            x, normed = normed_sum(layer["attn_norm"], x, added)
            sites.append(undivided(layer["attn_norm"], normed))
            here = replace(ctx, pending=waiting, sites=tuple(sites))
            mixed, new = mixer.read(
                cfg, policy, layer[name], state, normed, here, prepared[name, policy], index
            )
            fresh.append(new)
            if not cfg.parallel_block:
                mixed = summed(mixed, cache.backend) if mixer.divides else mixed
                x, normed = normed_sum(layer["mlp_norm"], x, mixed)
            elif not cfg.shared_norm:
                _, normed = normed_sum(layer["mlp_norm"], x, None)
            own_norm = "attn_norm" if cfg.shared_norm else "mlp_norm"
            sites.append(undivided(layer[own_norm], normed))
            if mlp is None:
                fed = feed_forward(cfg, layer["mlp"], normed, index, cache.backend, sites)
            else:
                fed = mlp(cfg, layer["mlp"], normed, index)
            if cfg.parallel_block and mixer.divides:
                added = summed(mixed + fed, cache.backend)
            else:
                fed = summed(fed, cache.backend)
                added = mixed + fed if cfg.parallel_block else fed
    x = x if added is None else x + added
    return x, tuple(fresh)


def unembed(
    cfg: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    backend: Backend | None = None,
) -> Float[Array, "B T V"]:
    """Logits in float32; `backend` is for a head that is stored in fewer bits."""
    if cfg.tie_embeddings:
        logits = product(hidden, params["embed"]["tokens"], jnp.float32, backend)
        return gathered(logits, cfg.vocab_size, backend)
    head = params["head"]
    logits = product(hidden, head["weight"], backend=backend)
    logits = logits + head["bias"] if "bias" in head else logits
    return gathered(logits.astype(jnp.float32), cfg.vocab_size, backend)


def logit_count(cfg: ModelConfig, params: Params) -> int:
    """Logits per token: the vocabulary, or fewer where a draft has a reduced head."""
    return cfg.vocab_size if cfg.tie_embeddings else params["head"]["weight"].shape[0]


def commit(
    cfg: ModelConfig,
    params: Params,
    cache: Cache,
    fresh: tuple[Leaf, ...],
    accepted: Int[Array, "B A"] | None,
    count: Int[Array, " B"],
    after: Array | None = None,
    *,
    is_prompt: bool = False,
) -> Cache:
    """The cache after row b's fresh tokens `accepted[b, :count[b]]` (None: the first ones) were
    accepted.

    `after` is any array computed from the forward's output, such as the sampled tokens: it orders
    the writes behind the reads (`jaxinfer.cache.base.write_index`), without it XLA copies the
    cache. `is_prompt` as the forward's context had it.
    """
    ctx = CommitContext(
        length=cache.length,
        accepted=accepted,
        count=count,
        after=count if after is None else after,  # no part of the output: right, but not in place
        is_prompt=is_prompt,
    )
    layers = []
    for layer, state, policy, added in zip(
        params["layers"], cache.layers, cache.policies, fresh, strict=True
    ):
        name, mixer = mixer_of(layer)
        layers.append(mixer.commit(cfg, policy, layer[name], state, added, ctx))
    return replace(cache, length=cache.length + count, layers=tuple(layers), pending=())
