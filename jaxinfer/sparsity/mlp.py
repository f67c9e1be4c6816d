"""A feed-forward block in which each token uses only the blocks of neurons that a selector chose.

It stands in the parameter tree where a dense block does, so every decoder and every cache policy
serves it. A step of few tokens reads just the blocks that any of them selected; one of many (a
prompt) reads all of them. Either way a token's result is that of its own selection, whoever shares
the step (arXiv 2310.17157, section 4; with neurons grouped into experts, 2402.06126, section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.arguments import shown
from jaxinfer.cache.base import bytes_of
from jaxinfer.config import ModelConfig
from jaxinfer.cpu_kernels.listed_mlp import fits
from jaxinfer.nn.block_mlp import BlockWeights, block_mlp, gated, hidden_values
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import Int8Weight, StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Selector, expected_union
from jaxinfer.typing import Leaf, Params

# Shares of the blocks from which on reading all of them is as fast. On two CPU cores (XLA CPU, jax
# 0.10.2, blocks of 32, float32) a loop, which runs on one of them, breaks even with 1, 2, 4, 8 rows
# at 0.59, 0.56, 0.51, 0.44 of 256 x 2048, which the cores' own caches hold, at 0.43, 0.69, 0.44,
# 0.27 of 576 x 1536 with a gate and at 0.35, 0.38, 0.31, 0.32 of 1024 x 4096; blocks smaller than
# these cost more than they save. The others: 8 bits there, and the kernel on an H200.
CPU_PAYS, CPU_LARGE_PAYS, CPU_INT8_PAYS, GPU_PAYS = 0.45, 0.3, 0.65, 0.7
CACHED_BYTES = 1 << 23  # of a block, from which on it counts as large
SMALLEST_BLOCK = 16  # neurons
# The same for the kernel `jaxinfer.cpu_kernels.listed_mlp`, with blocks of any size: 1 row of
# float32 takes the time of the dense block at 0.9 to 1.0, 4 rows at 0.7. Where all blocks of int8
# are read, XLA makes floating numbers of `down` first.
KERNEL_PAYS, KERNEL_INT8_PAYS = 0.65, 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SparseMlp(FeedForward):
    """The weights of a block, and what selects among its blocks of neurons.

    `unions[i]` is the share of the blocks that 2**i tokens are expected to use together, as it was
    measured; beyond the last, and where it is empty, tokens count as independent.

    Raises:
      ValueError: unions that are no shares, or fall.
    """

    weights: BlockWeights
    selector: Selector
    unions: tuple[float, ...] = field(default=(), metadata={"static": True})

    def __post_init__(self):
        steps = zip((0.0, *self.unions), (*self.unions, 1.0), strict=True)
        if not all(before <= after for before, after in steps):  # not of nan either
            raise ValueError(
                "unions must be shares from 0 to 1 that do not fall as tokens become more, got "
                + shown(list(self.unions))
            )

    @classmethod
    def of(
        cls, dense: Params, selector: Selector, *, unions: Sequence[float] = ()
    ) -> "SparseMlp":  # fmt: skip
        """The parameters of a dense block, shared but for `down`, with a selector of its blocks.

        Weights of 8 bits keep their codes and scales; inputs are then rounded to 8 bits as in the
        dense block, hidden values are not. Other stored weights (of 4 bits, or for a kernel) are
        taken in full, since no kernel reads them in blocks: at a density of a quarter as many bytes
        as of 4 bits.

        Raises:
          ValueError: the selector's units do not divide the neurons, or its width is another.
        """
        neurons, width = dense["up"]["weight"].shape
        if neurons % selector.units:
            raise ValueError(
                f"a block of {neurons} neurons cannot be cut into {selector.units} equal blocks"
            )
        read = getattr(selector, "width", width)
        if read != width:
            raise ValueError(f"the selector reads a width of {read}, the block has {width}")
        biases = {f"{name}_bias": part["bias"] for name, part in dense.items() if "bias" in part}
        matrices = {name: part["weight"] for name, part in dense.items()}
        weights = BlockWeights(**_neuron_major(matrices), **biases)
        return cls(weights=weights, selector=selector, unions=tuple(unions))

    def as_dense(self) -> Params | None:
        w = self.weights
        if w.is_int8:
            return None
        parts = {
            "up": (w.up, w.up_bias), "gate": (w.gate, w.gate_bias), "down": (w.down.T, w.down_bias)
        }  # fmt: skip
        return {
            name: {"weight": weight} | ({} if bias is None else {"bias": bias})
            for name, (weight, bias) in parts.items()
            if weight is not None
        }

    def holding(self, dense: Params) -> "SparseMlp":
        return SparseMlp.of(dense, self.selector, unions=self.unions)

    def hidden(
        self, cfg: ModelConfig, x: Float[Array, "B T D"], sites: Sequence[Array] = ()
    ) -> Float[Array, "R F"]:
        rows, selected = x.reshape(-1, x.shape[-1]), self.selector(sites or (x,))
        return gated(hidden_values(self.weights, rows, cfg.activation), selected)

    @property
    def block_size(self) -> int:
        """Neurons of a block."""
        return self.weights.up.shape[0] // self.selector.units

    def __call__(
        self,
        cfg: ModelConfig,
        x: Float[Array, "B T D"],
        sites: Sequence[Array] = (),
        backend: Backend | None = None,
    ) -> Float[Array, "B T D"]:
        rows, sites = x.reshape(-1, x.shape[-1]), sites or (x,)
        listed = self.lists(len(rows), backend)
        y = block_mlp(
            self.weights, rows, self.selector.listed(sites) if listed else self.selector(sites),
            block_size=self.block_size, activation=cfg.activation, backend=backend,
        )  # fmt: skip
        return y.astype(x.dtype).reshape(x.shape)

    def union(self, rows: int) -> float:
        """The share of the blocks that `rows` tokens are expected to use together; between two
        numbers that were measured the larger one."""
        return expected_union(self.unions, self.selector.share(), rows)

    def pays_below(self, backend: Backend | None, rows: int = 1) -> float:
        """The share of the blocks below which a list of them is read faster than all of them are,
        by a step of `rows` tokens.

        Without a `backend` none is: the products of training have a gradient, those of a list not.
        """
        if backend is None:
            return 0.0
        if backend.has_kernels:
            return 0.0 if self.weights.is_int8 else GPU_PAYS
        if backend.cpu_kernels and fits(rows, self.weights.up):
            return KERNEL_INT8_PAYS if self.weights.is_int8 else KERNEL_PAYS
        if self.block_size < SMALLEST_BLOCK:
            return 0.0
        if self.weights.is_int8:
            return CPU_INT8_PAYS
        return CPU_PAYS if bytes_of(self.weights) < CACHED_BYTES else CPU_LARGE_PAYS

    def lists(self, rows: int, backend: Backend | None) -> bool:
        """Whether a step of `rows` tokens reads listed blocks instead of all."""
        return self.union(rows) < self.pays_below(backend, rows)

    def read_bytes(self, rows: int = 1, backend: Backend | None = None) -> int:
        share = self.union(rows) if self.lists(rows, backend or Backend.of()) else 1.0
        w = self.weights
        shared = bytes_of((w.down_bias, w.down_scale))
        return bytes_of(self.selector) + shared + round(share * (bytes_of(w) - shared))

    def typical(self, rows: int = 1) -> "SparseMlp":
        """With a selector that selects what `rows` equal tokens are expected to use together."""
        buckets = range(max(rows - 1, 0).bit_length() + 1)
        unions = tuple(self.union(2**i) for i in buckets)
        return replace(self, selector=self.selector.typical(self.union(rows)), unions=unions)


def _neuron_major(matrices: dict[str, Leaf]) -> dict[str, Leaf]:
    """Fields of `BlockWeights` from a dense block's weights [O, I]."""
    up, gate, down = matrices["up"], matrices.get("gate"), matrices["down"]
    inner = [weight for weight in (up, gate) if weight is not None]
    if all(isinstance(w, Int8Weight) for w in (*inner, down)) and not any(
        weight.smooth is not None for weight in inner
    ):
        return {
            "up": up.codes, "up_scale": up.scale,
            "gate": None if gate is None else gate.codes,
            "gate_scale": None if gate is None else gate.scale,
            "down": down.codes.T, "down_scale": down.scale,
            "hidden_scale": None if down.smooth is None else 1 / down.smooth,
        }  # fmt: skip
    up, gate, down = (None if w is None else _in_full(w) for w in (up, gate, down))
    return {"up": up, "gate": gate, "down": down.T}


def _in_full(weight: Leaf) -> Leaf:
    if not isinstance(weight, StoredWeight):
        return weight
    return weight.rows(jnp.arange(weight.shape[0]))
