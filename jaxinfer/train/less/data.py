"""What LESS's feature maps learn from: the activations of one frozen layer at a time.

The model is walked through layer by layer (`jaxinfer.models.layer_reader`), so that memory is that
of one layer, whatever the depth. Activations are kept in float16, log-sum-exps in float32.
Extra letters: Q sequences, P eviction policies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models.activations import Activations
from jaxinfer.models.attention import attention_spec
from jaxinfer.models.layer_reader import LayerReader
from jaxinfer.train.less.objective import Eviction, kept_attention, leaving_order
from jaxinfer.typing import Params


@dataclass(frozen=True, kw_only=True)
class LayerData:
    """Activations of one layer over all sequences, and its attention under every policy.

    `target` is the attention's output after its projection; `kept`, `lse`, `order` are those of
    `jaxinfer.train.less.objective`, `order` padded to T with T.
    """

    q: np.ndarray  # f16[Q, N, T, H], rotated as k
    k: np.ndarray  # f16[Q, K, T, H]
    v: np.ndarray  # f16[Q, K, T, H]
    target: np.ndarray  # f16[Q, T, D]
    kept: np.ndarray  # f16[Q, P, N, T, H]
    lse: np.ndarray  # f32[Q, P, N, T]
    order: np.ndarray  # i16[Q, P, K, T]

    def batch(
        self, rows: Sequence[int], policies: Sequence[Eviction], which: Sequence[int],
        shifts: Sequence[int], stride: int,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Some rows of sequences `rows` under policies `which`, in the form of `strided_low_rank`.

        With shift s in 1..stride, these are the rows that have lost s, s + stride, ... tokens.
        """
        parts = [
            self._one(row, policies[policy], policy, shift, stride)
            for row, policy, shift in zip(rows, which, shifts, strict=True)
        ]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _one(self, row: int, eviction: Eviction, policy: int, shift: int, stride: int):
        tokens = self.target.shape[1]
        count = tokens // stride
        lost = shift + stride * np.arange(count)
        index = np.minimum(eviction.capacity + lost, tokens - 1)
        order = self.order[row, policy, :, : count * stride - (stride - shift)]
        order = np.minimum(order, tokens - 1)[..., None]  # entries beyond the last serve no row

        def evicted(x: np.ndarray) -> np.ndarray:
            taken = np.take_along_axis(x[row], order, axis=1)
            # Keys of zero have features of zero.
            return np.pad(taken, ((0, 0), (stride - shift, 0), (0, 0)))

        return {
            "q": self.q[row][:, index],
            "k": evicted(self.k),
            "v": evicted(self.v),
            "kept": self.kept[row, policy][:, index],
            "lse": self.lse[row, policy][:, index],
            "target": self.target[row, index],
            "weight": (eviction.capacity + lost < tokens).astype(np.float32),
        }


class Harvester:
    """Walks through a frozen model; one compiled program serves layers of a kind."""

    def __init__(self, cfg: ModelConfig, context: int):
        if cfg.alibi_slopes is not None or cfg.sliding_windows is not None:
            raise ValueError(
                f"LESS cannot serve {cfg.family}: its state forgets the distances that ALiBi and "
                "sliding windows need"
            )
        if context > np.iinfo(np.int16).max:
            raise ValueError(f"contexts of more than 32767 tokens are not supported, got {context}")
        self.cfg, self.context, self.spec = cfg, context, attention_spec(cfg, 0)
        self._reader = LayerReader(cfg, context, _attention)
        self._kept = jax.jit(kept_attention, static_argnums=(0, 1))

    def embed(self, params: Params, tokens: np.ndarray) -> np.ndarray:
        """The states f32[Q, T, D] in front of layer 0."""
        return self._reader.embed(params, tokens)

    def read(
        self,
        index: int,
        layer: Params,
        hidden: np.ndarray,
        policies: Sequence[Eviction],
        report: Callable[[int], None] = lambda done: None,
    ) -> LayerData:
        """Layer `index`'s activations; `hidden` becomes the states behind the layer."""
        found: list[dict[str, np.ndarray]] = []
        for taken in self._reader.each(index, layer, hidden):
            one = {name: np.asarray(x, np.float16) for name, x in taken.items()}
            q, k, v = (taken[name][None] for name in "qkv")
            found.append(one | self.kept(policies, q, k, v))
            report(len(found))
        return LayerData(**{name: np.stack([one.pop(name) for one in found]) for name in _FIELDS})

    def advance(
        self,
        index: int,
        layer: Params,
        hidden: np.ndarray,
        report: Callable[[int], None] = lambda done: None,
    ) -> None:
        """`hidden` becomes the states behind layer `index`."""
        for row, _ in enumerate(self._reader.each(index, layer, hidden)):
            report(row + 1)

    def kept(self, policies: Sequence[Eviction], q, k, v) -> dict[str, np.ndarray]:
        """`kept`, `lse` and `order` of one sequence, [P, ...]."""
        kept, lse, order = [], [], []
        for eviction in policies:
            found = self._kept(eviction, self.spec, q, k, v)
            kept.append(np.asarray(found.out[0], np.float16))
            lse.append(np.asarray(found.lse[0]))
            ranks = leaving_order(np.asarray(found.leave_row[0]), eviction.capacity)
            rest = self.context - ranks.shape[1]
            padded = np.pad(ranks, ((0, 0), (0, rest)), constant_values=self.context)
            order.append(padded.astype(np.int16))
        return {"kept": np.stack(kept), "lse": np.stack(lse), "order": np.stack(order)}


def _attention(index: int, layer: Params, found: Activations) -> dict[str, jax.Array]:
    if found.q is None:
        raise ValueError(f"layer {index} has no attention that LESS could serve")
    qkv = {name: getattr(found, name).swapaxes(0, 1).astype(jnp.float32) for name in "qkv"}
    return qkv | {"target": found.mixed}


_FIELDS = ("q", "k", "v", "target", "kept", "lse", "order")


def default_policies(context: int) -> tuple[Eviction, ...]:
    """H2O at 2, 5 and 10 % of the context, half heavy and half recent, and a sink window at 5 %."""

    def half(share: float) -> int:
        return max(1, int(share / 2 * context))

    heavy = [Eviction(heavy=half(s), recent=half(s)) for s in (0.02, 0.05, 0.10)]
    return (*heavy, Eviction(sinks=4, recent=max(1, 2 * half(0.05) - 4)))
