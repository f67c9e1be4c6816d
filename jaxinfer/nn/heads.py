"""Attention in which each token uses only some groups of heads.

A group is a key/value head with all query heads that share it: if a part of them were skipped, no
byte of the cache would be saved (arXiv 2310.17157, section 4.2; 2505.14884 for grouped queries).
What a token's unselected groups would add to the layer's output is zero. Axis letters: K groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinfer.nn.listed import Listing, has_parts
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params

Keys = Literal["always", "deferred"]
KEYS: tuple[Keys, ...] = ("always", "deferred")
"""When keys and values of skipped groups are made: with the token, or once they are needed."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What selects a layer's groups of heads; a pytree. It stands among the layer's attention
    parameters as "heads"."""

    keys: Keys = field(default="always", metadata={"static": True})

    def __call__(self, sites: Sequence[Float[Array, "B T D"]]) -> Bool[Array, "R K"]:
        """What each of the B * T rows uses; `sites` as in `StepContext`."""
        raise NotImplementedError

    def lists(self, rows: int, backend: Backend | None) -> bool:
        """Whether a step of so many rows reads the weights of listed groups instead of all."""
        return False

    def read_bytes(self, attention: Params, rows: int = 1, backend: Backend | None = None) -> int:
        """Bytes of the attention parameters, these heads among them, that a step of so many rows is
        expected to read on `backend` (default: this machine's)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(attention))

    def typical(self, rows: int = 1) -> "Heads":
        """Heads with the cost that steps of so many rows are expected to have, whatever the
        inputs."""
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The groups that the tokens of a step use, and where weights of those alone are read, their
    list."""

    selected: Leaf  # bool[B, T, K]
    listing: Listing | None

    def masked(self, y: Float[Array, "B N T H"]) -> Float[Array, "B N T H"]:
        """Attention outputs, 0 in groups that a token did not select."""
        batch, heads, size, width = y.shape
        own = self.selected.transpose(0, 2, 1)[:, :, None, :, None]
        y = y.reshape(batch, own.shape[1], -1, size, width)
        return jnp.where(own, y, 0).reshape(batch, heads, size, width)


def chosen(
    params: Params,
    x: Float[Array, "B T D"],
    sites: Sequence[Array],
    backend: Backend | None,
    is_prompt: bool,
) -> Chosen | None:
    """What the layer's tokens select; None where they use all heads. A prompt reads all weights, as
    its tokens together do."""
    heads = params.get("heads")
    if heads is None:
        return None
    selected = heads(sites or (x,))
    listing = None
    if backend is not None and not is_prompt and heads.lists(len(selected), backend):
        listing = (
            Listing.of(selected) if has_parts(params["q"]["weight"], x.dtype, backend, 0) else None
        )
    return Chosen(selected=selected.reshape(*x.shape[:2], -1), listing=listing)
