"""The groups of heads that each token uses, chosen by a selector (arXiv 2310.17157, section 4.2).

It stands among a layer's attention parameters as "heads". Keys and values of the groups that a
token skips are needed by later tokens that use them: they are made with the token ("always"), or
from its stored input when a group needs them, and for all groups at every 16th token ("deferred",
`jaxinfer.models.deferred`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
from jaxtyping import Array, Bool, Float

from jaxinfer.arguments import one_of
from jaxinfer.cache.base import bytes_of
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.policy import Policy
from jaxinfer.config import ModelConfig
from jaxinfer.models.deferred import TAIL
from jaxinfer.nn.heads import KEYS, Heads
from jaxinfer.nn.linear import SKINNY_NUMBERS, SKINNY_ROWS
from jaxinfer.nn.listed import InputMajor, has_parts
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Selector, expected_union
from jaxinfer.typing import Params

SMALLEST_GROUP = 1 << 15  # numbers of a group's queries; of smaller ones a CPU's loop costs more
CPU_PAYS, GPU_PAYS = 0.5, 0.7  # shares of the groups up to which a step lists them


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SparseHeads(Heads):
    """What selects among the groups of a layer.

    `unions[i]` is the share of the groups that 2**i tokens are expected to use together, as it was
    measured; beyond the last, and where it is empty, tokens count as independent. `group_size` is
    the numbers of a group's query weights.
    """

    selector: Selector
    group_size: int = field(metadata={"static": True})
    unions: tuple[float, ...] = field(default=(), metadata={"static": True})

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        selector: Selector,
        *,
        keys: str = "always",
        unions: Sequence[float] = (),
    ) -> "SparseHeads":
        """The heads of a model's layer by `selector`, whose units are the key/value heads.

        Raises:
          ValueError: the units are others, the width is another, or `keys` names no way.
        """
        when = one_of("keys", keys, KEYS)
        groups, heads = cfg.num_kv_heads, cfg.num_heads
        if selector.units != groups:
            raise ValueError(
                f"heads are selected in groups that share keys and values, {groups} in this model "
                f"of {heads} query heads; the selector has {selector.units} units"
            )
        read = getattr(selector, "width", cfg.hidden_size)
        if read != cfg.hidden_size:
            raise ValueError(f"the selector reads a width of {read}, the layer {cfg.hidden_size}")
        size = heads // groups * cfg.head_dim * cfg.hidden_size
        return cls(selector=selector, group_size=size, keys=when, unions=tuple(unions))

    def __call__(self, sites: Sequence[Float[Array, "B T D"]]) -> Bool[Array, "R K"]:
        return self.selector(sites)

    def union(self, rows: int) -> float:
        """The share of the groups that `rows` tokens are expected to use together."""
        return expected_union(self.unions, self.selector.share(), rows)

    def lists(self, rows: int, backend: Backend | None) -> bool:
        if backend is None:
            return False
        if backend.has_kernels:
            few = rows <= SKINNY_ROWS and self.group_size * self.selector.units <= SKINNY_NUMBERS
            return few and self.union(rows) <= GPU_PAYS
        return self.group_size >= SMALLEST_GROUP and self.union(rows) <= CPU_PAYS

    def cache_share(self, policy: Policy, backend: Backend | None = None) -> float:
        """The share of the cache's bytes that a row's token reads: of a full cache, where a kernel
        reads it (`pallas_kernels.sparse_heads`), its own heads alone."""
        is_full = policy.window is None and all(isinstance(tier, Dense) for tier in policy.tiers)
        return self.selector.share() if is_full and (backend or Backend.of()).has_kernels else 1.0

    def typical(self, rows: int = 1) -> "SparseHeads":
        unions = tuple(self.union(2**i) for i in range(max(rows - 1, 0).bit_length() + 1))
        return replace(self, selector=self.selector.typical(self.union(rows)), unions=unions)

    def read_bytes(
        self, attention: Params, rows: int = 1, backend: Backend | None = None
    ) -> int:  # fmt: skip
        backend = backend or Backend.of()
        weights = {name: attention[name]["weight"] for name in ("q", "k", "v", "out")}
        parts = {
            name: has_parts(weight, weight.dtype, backend, int(name == "out"))
            for name, weight in weights.items()
        }
        listed = parts["q"] and self.lists(rows, backend)

        def times(name: str) -> float:
            """How often a step reads a weight."""
            share = self.union(rows) if listed and parts[name] else 1.0
            if name not in ("k", "v"):
                return share
            if self.keys == "always":
                return 1.0
            # and where a tail is full once more; kernels that cannot leave parts out do so always
            return share + (1 / TAIL if parts[name] or not backend.has_kernels else 1.0)

        left = sum(round((1 - times(name)) * bytes_of(weight)) for name, weight in weights.items())
        return bytes_of(attention) - left


def with_heads(attention: Params, heads: Heads, backend: Backend | None = None) -> Params:
    """A layer's attention parameters with a selection of heads.

    All are shared, but on a CPU the output projection is transposed (`InputMajor`), so that a
    group's part of it is contiguous; for kernels it is turned back. `backend` is that of the model,
    by default this machine's.
    """
    out, kernels = attention["out"], (backend or Backend.of()).has_kernels
    weight = out["weight"]
    if isinstance(weight, InputMajor) and kernels:
        out = out | {"weight": weight.weight.T}
    elif not kernels and not isinstance(weight, StoredWeight):
        out = out | {"weight": InputMajor.of(weight)}
    return attention | {"out": out, "heads": heads}


def arranged(params: Params, backend: Backend | None = None) -> Params:
    """A model's parameters with the output projections of layers with heads as `with_heads` keeps
    them on `backend`; the same parameters where there is no such layer."""
    layers = tuple(
        layer | {"attn": with_heads(layer["attn"], layer["attn"]["heads"], backend)}
        if "heads" in layer.get("attn", {})
        else layer
        for layer in params["layers"]
    )
    changed = any("heads" in layer.get("attn", {}) for layer in layers)
    return params | {"layers": layers} if changed else params
