"""The groups of heads that each token uses, chosen by a selector (arXiv 2310.17157, section 4.2).

It stands among a layer's attention parameters as "heads". Keys and values of the groups that a
token skips are needed by later tokens that use them: they are made with the token ("always"), or
from its stored input when a group needs them, and for all groups at every 16th token ("deferred",
`jaxinfer.models.deferred`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Bool, Float

from jaxinfer.arguments import one_of
from jaxinfer.config import ModelConfig
from jaxinfer.nn.heads import KEYS, Heads
from jaxinfer.nn.linear import SKINNY_NUMBERS, SKINNY_ROWS
from jaxinfer.nn.listed import InputMajor
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


def with_heads(
    attention: Params, heads: SparseHeads, backend: Backend | None = None
) -> Params:  # fmt: skip
    """A layer's attention parameters with a selection of heads; shared, but for a CPU the output
    projection, which is transposed so that a group's part of it is contiguous. `backend` is that of
    the model, by default this machine's."""
    out, on_cpu = attention["out"], not (backend or Backend.of()).has_kernels
    if on_cpu and not isinstance(out["weight"], StoredWeight):
        out = out | {"weight": InputMajor.of(out["weight"])}
    return attention | {"out": out, "heads": heads}
