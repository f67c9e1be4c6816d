"""Which part of a block each token uses: the one selection that every form of computing it shares.

A selector reads the input of the block itself or of an earlier one (look-ahead), scores J units
(neurons, blocks of neurons, or groups of heads) and selects some of them for each row. A row's
selection, and so its result, never depends on the rows it shares a step with.

Axis letters: R rows (tokens of all texts of a step), J units, P rank of a router.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.nn.block_mlp import Listed, union_list
from jaxinfer.nn.linear import product
from jaxinfer.typing import Leaf

LOOKAHEADS = (0.0, 0.5, 1.0)  # layers


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How scores select: those above `threshold`, of these at most the `most` largest; on a tie the
    first. One of the two is given, or both."""

    most: int | None = None
    threshold: float | None = None

    def __post_init__(self):
        if self.most is None and self.threshold is None:
            raise ValueError("a selection needs a number of units, a threshold, or both")
        if self.most is not None and self.most < 1:
            raise ValueError(f"a selection keeps at least 1 unit, got most={self.most}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("threshold must be a number, got nan")

    def __call__(self, scores: Float[Array, "R J"]) -> Bool[Array, "R J"]:
        """Which units each row uses."""
        selected = jnp.ones(scores.shape, bool)
        if self.most is not None and self.most < scores.shape[-1]:
            rows = jnp.arange(len(scores))[:, None]
            selected = jnp.zeros(scores.shape, bool).at[rows, self._best(scores)].set(True)
        return selected if self.threshold is None else selected & (scores > self.threshold)

    def listed(self, scores: Float[Array, "R J"]) -> Listed:
        """The units that the rows use, as a list. That of one row and a number of units is what
        sorting gives: on a GPU each of the operations that turn a mask into a list is a launch."""
        if len(scores) == 1 and self.most is not None and self.threshold is None:
            best = self._best(scores)[0]
            return Listed(best, jnp.int32(len(best)), None)
        return union_list(self(scores))

    def _best(self, scores: Float[Array, "R J"]) -> Int[Array, "R _"]:
        return jax.lax.top_k(scores, min(self.most or 1, scores.shape[-1]))[1]

    def share(self, units: int) -> float:
        """The largest share of `units` that a row can use."""
        return 1.0 if self.most is None else min(self.most / units, 1.0)


class Selector:
    """Selects the units of a block; a pytree. `units` is J."""

    @property
    def units(self) -> int:
        raise NotImplementedError

    def __call__(self, sites: Sequence[Float[Array, "B T D"]]) -> Bool[Array, "R J"]:
        """What each of the B * T rows uses, given the inputs of all blocks so far."""
        raise NotImplementedError

    def listed(self, sites: Sequence[Float[Array, "B T D"]]) -> Listed:
        """What all rows together use, as a list."""
        return union_list(self(sites))

    def share(self) -> float:
        """The largest share of the units that a row can use."""
        return 1.0

    def typical(self, share: float) -> "Selector":
        """One that costs as much and selects the `share` of the units, whatever it reads."""
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Router(Selector):
    """Scores `outer (inner x) + bias`: the low-rank linear classifier of DejaVu (arXiv 2310.17157,
    section 4.1), or without `inner` the linear router of LTE (2402.06126, section 4.2).

    `lookahead` is where x is taken: 0 at the block's own input, 1/2 at that of the block before (of
    a feed-forward block the attention of its layer), 1 at that of its own kind one layer earlier;
    None is the token's embedding, which no context has touched.
    """

    outer: Leaf  # [J, P], or [J, D] without inner
    inner: Leaf = None  # [P, D]
    bias: Leaf = None  # [J]
    rule: Rule = field(metadata={"static": True})
    lookahead: float | None = field(default=0.0, metadata={"static": True})

    @property
    def units(self) -> int:
        return self.outer.shape[0]

    @property
    def width(self) -> int:
        """D, the width of what it reads."""
        return (self.outer if self.inner is None else self.inner).shape[1]

    def scores(self, x: Float[Array, "R D"]) -> Float[Array, "R J"]:
        """One score per unit, in float32."""
        inner = x if self.inner is None else product(x, self.inner, jnp.float32)
        scores = product(inner, self.outer, jnp.float32)
        return scores if self.bias is None else scores + self.bias

    def __call__(self, sites: Sequence[Float[Array, "B T D"]]) -> Bool[Array, "R J"]:
        return self.rule(self._scores_of(sites))

    def listed(self, sites: Sequence[Float[Array, "B T D"]]) -> Listed:
        return self.rule.listed(self._scores_of(sites))

    def _scores_of(self, sites: Sequence[Array]) -> Array:
        x = site(sites, self.lookahead)
        return self.scores(x.reshape(-1, x.shape[-1]))

    def share(self) -> float:
        return self.rule.share(self.units)

    def typical(self, share: float) -> "Router":
        return replace(self, rule=Rule(most=max(round(share * self.units), 1)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Static(Selector):
    """The same units for every token."""

    selected: Leaf  # bool[J]

    @property
    def units(self) -> int:
        return self.selected.shape[0]

    def __call__(self, sites: Sequence[Float[Array, "B T D"]]) -> Bool[Array, "R J"]:
        rows = math.prod(sites[-1].shape[:-1])
        return jnp.broadcast_to(self.selected, (rows, self.units))


def expected_union(unions: Sequence[float], share: float, rows: int) -> float:
    """The share of the units that `rows` tokens are expected to use together: `unions[i]` of 2**i
    as it was measured. Beyond the last tokens count as independent, without any each with `share`.
    """
    place = max(rows - 1, 0).bit_length()
    if place < len(unions):
        return unions[place]
    known = unions[-1] if unions else share
    left = rows / 2 ** max(len(unions) - 1, 0)
    return 1 - (1 - known) ** left


def site(sites: Sequence[Array], lookahead: float | None) -> Array:
    """What a selector with `lookahead` reads.

    Raises:
      ValueError: the block is too early in the model for it.
    """
    if lookahead is None:
        return sites[0]
    back = 1 + round(2 * lookahead)
    if back > 1 and len(sites) <= back:  # the embeddings in front are no block's input
        raise ValueError(
            f"a selector with look-ahead {lookahead:g} needs {back - 1} blocks in front of its "
            "own; keep the first layers dense"
        )
    return sites[-back]


def check_lookahead(lookahead: object) -> float:
    """A look-ahead that models can carry.

    Raises:
      ValueError: any other value.
    """
    if isinstance(lookahead, bool) or lookahead not in LOOKAHEADS:
        raise ValueError(f"lookahead must be 0, 0.5 or 1 layers, got {lookahead!r}")
    return float(lookahead)  # type: ignore[arg-type]
