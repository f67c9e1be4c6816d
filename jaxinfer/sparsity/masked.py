"""Feed-forward blocks that are computed whole and then masked: what methods are judged by which
look at the block's own hidden values, so that nothing is saved unless a kernel of their own reads
less. The text that a model writes with them is that of the real method.

Axis letters: B rows of a batch, T tokens, F neurons, J blocks of neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinfer.config import ModelConfig
from jaxinfer.nn.activation import activate
from jaxinfer.nn.linear import linear, linears
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.runtime.backend import Backend
from jaxinfer.typing import Leaf, Params


class Seen(NamedTuple):
    """What a criterion may look at."""

    hidden: Leaf  # [B, T, F], what `down` multiplies
    gate: Leaf  # [B, T, F], the activated gate; without a gate the hidden values


class Criterion:
    """Chooses neurons by their hidden values; a pytree."""

    def __call__(self, seen: Seen) -> Bool[Array, "B T F"]:
        """Which neurons each token uses."""
        raise NotImplementedError

    def in_full(self, dense: Params) -> tuple[str, ...]:
        """The weights that a real implementation reads in full to choose; the others it reads where
        they are chosen. Empty for a bound that no implementation reaches."""
        return ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MaskedMlp(FeedForward):
    """A dense block, and what chooses among its neurons."""

    dense: Leaf  # the block's parameters, shared
    criterion: Leaf

    def __call__(
        self,
        cfg: ModelConfig,
        x: Float[Array, "B T D"],
        sites: Sequence[Array] = (),
        backend: Backend | None = None,
    ) -> Float[Array, "B T D"]:
        seen = hidden_values(cfg, self.dense, x, backend)
        hidden = jnp.where(self.criterion(seen), seen.hidden, 0)
        return linear(self.dense["down"], hidden, backend)

    def as_dense(self) -> Params:
        return self.dense

    def holding(self, dense: Params) -> "MaskedMlp":
        return replace(self, dense=dense)

    def hidden(
        self, cfg: ModelConfig, x: Float[Array, "B T D"], sites: Sequence[Array] = ()
    ) -> Float[Array, "R F"]:
        seen = hidden_values(cfg, self.dense, x)
        hidden = jnp.where(self.criterion(seen), seen.hidden, 0)
        return hidden.reshape(-1, hidden.shape[-1])

    def selected(self, cfg: ModelConfig, x: Float[Array, "B T D"]) -> Bool[Array, "B T F"]:
        """Which neurons each token uses."""
        return self.criterion(hidden_values(cfg, self.dense, x))


def hidden_values(
    cfg: ModelConfig, dense: Params, x: Float[Array, "B T D"], backend: Backend | None = None
) -> Seen:
    """What a dense block computes in front of `down`."""
    if "gate" not in dense:
        hidden = activate(cfg.activation, linear(dense["up"], x, backend))
        return Seen(hidden, hidden)
    up, gate = linears((dense["up"], dense["gate"]), x, backend)
    gate = activate(cfg.activation, gate)
    return Seen(gate * up, gate)


def largest(scores: Float[Array, "*R J"], most: Array) -> Bool[Array, "*R J"]:
    """The `most` largest of each row that are above zero; with a tie there may be more. Unlike in
    `jaxinfer.sparsity.base.Rule` the number is traced: one program serves every density."""
    ordered = jnp.sort(scores, axis=-1)
    place = scores.shape[-1] - most
    least = jax.lax.dynamic_index_in_dim(ordered, place, axis=scores.ndim - 1)
    return (scores >= least) & (scores > 0)


def in_blocks(scores: Float[Array, "*R F"], size: int) -> Float[Array, "*R J"]:
    """Sums over blocks of `size` neurons."""
    return scores.reshape(*scores.shape[:-1], -1, size).sum(axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LargestHidden(Criterion):
    """The blocks of `size` neurons with the largest sums of magnitudes: the oracle of DejaVu's
    existence test (arXiv 2310.17157, section 3.1), and with grouped neurons MoEfication's
    ground-truth selection (2110.01786). With `norms` magnitudes count times the norm of the
    neuron's row of `down`."""

    most: Leaf  # i32[]
    norms: Leaf = None  # f32[F]
    size: int = field(default=1, metadata={"static": True})

    def __call__(self, seen: Seen) -> Bool[Array, "B T F"]:
        scores = jnp.abs(seen.hidden.astype(jnp.float32))
        if self.norms is not None:
            scores = scores * self.norms
        chosen = largest(in_blocks(scores, self.size), self.most)
        return jnp.repeat(chosen, self.size, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LargeGate(Criterion):
    """The neurons whose activated gate is larger in magnitude than a threshold (CATS, arXiv
    2404.08763, section 4). The gate is read in full, `up` and `down` where it is large; in a block
    without a gate `up` takes its place and only `down` is read in part."""

    threshold: Leaf  # f32[]

    def __call__(self, seen: Seen) -> Bool[Array, "B T F"]:
        return jnp.abs(seen.gate.astype(jnp.float32)) > self.threshold

    def in_full(self, dense: Params) -> tuple[str, ...]:
        return ("gate",) if "gate" in dense else ("up",)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ChosenByPrompt(Criterion):
    """Neurons that a text's prompt chooses for the rest of it (GRIFFIN, arXiv 2404.01365, section
    4): those whose activations, each token's brought to length 1, have the largest norm over the
    prompt. The prompt itself, the first `share` of the tokens that are read together, is computed
    whole.

    It judges texts that are read in one piece. A text that goes on token by token is served by a
    `Static` selection instead, made from its prompt (`jaxinfer.sparsity.baselines.of_prompt`).
    """

    most: Leaf  # i32[]
    size: int = field(default=1, metadata={"static": True})
    share: float = field(default=0.5, metadata={"static": True})

    def prompt(self, tokens: int) -> int:
        """How many of the tokens of a text are its prompt."""
        return int(self.share * tokens)

    def __call__(self, seen: Seen) -> Bool[Array, "B T F"]:
        tokens = seen.hidden.shape[1]
        prompt = self.prompt(tokens)
        if not prompt:
            raise ValueError(
                f"GRIFFIN chooses neurons by a text's prompt, but {tokens} tokens are read at "
                "once; read texts whole, and generate with `of_prompt`"
            )
        scores = in_blocks(prompt_scores(seen.hidden[:, :prompt]), self.size)
        chosen = jnp.repeat(largest(scores, self.most), self.size, axis=-1)
        is_prompt = jnp.arange(tokens)[:, None] < prompt
        return is_prompt | chosen[:, None]


def prompt_scores(hidden: Float[Array, "B T F"]) -> Float[Array, "B F"]:
    """GRIFFIN's statistic of every neuron of every text."""
    hidden = hidden.astype(jnp.float32)
    length = jnp.linalg.norm(hidden, axis=-1, keepdims=True)
    return jnp.linalg.norm(hidden / jnp.maximum(length, 1e-30), axis=1)
