"""A feed-forward block in which each token uses only the blocks of neurons that a selector chose.

It stands in the parameter tree where a dense block does, so every decoder and every cache policy
serves it. A step of few tokens reads just the blocks that any of them selected; one of many (a
prompt) reads all of them. Either way a token's result is that of its own selection, whoever shares
the step (arXiv 2310.17157, section 4; with neurons grouped into experts, 2402.06126, section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from jaxinfer.config import ModelConfig
from jaxinfer.nn.block_mlp import BlockWeights, block_mlp
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.nn.quantized import StoredWeight
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.base import Selector
from jaxinfer.typing import Params

SMALLEST_BLOCK = 16  # neurons; of smaller ones a loop costs more than it saves on a CPU
PAYS = {"cpu": 0.6, "gpu": 0.7}  # the share of the blocks below which a step lists them


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SparseMlp(FeedForward):
    """The weights of a block, and what selects among its blocks of neurons.

    `unions[i]` is the share of the blocks that 2**i tokens are expected to use together, as it was
    measured; beyond the last, and where it is empty, tokens count as independent.
    """

    weights: BlockWeights
    selector: Selector
    unions: tuple[float, ...] = field(default=(), metadata={"static": True})

    @classmethod
    def of(
        cls, dense: Params, selector: Selector, *, unions: Sequence[float] = ()
    ) -> "SparseMlp":  # fmt: skip
        """The parameters of a dense block, shared but for `down`, with a selector of its blocks.

        Raises:
          ValueError: the selector's units do not divide the neurons, its width is another, or the
            block is stored in few bits.
        """
        up = dense["up"]["weight"]
        if isinstance(up, StoredWeight):
            raise ValueError(
                "a sparse block reads floating weights, got a block that is stored in fewer bits; "
                "load the model without `weights`, make its blocks sparse, then quantize the "
                "rest with `quantize_weights`, which leaves them as they are"
            )
        neurons, width = up.shape
        if neurons % selector.units:
            raise ValueError(
                f"a block of {neurons} neurons cannot be cut into {selector.units} equal blocks"
            )
        read = getattr(selector, "width", width)
        if read != width:
            raise ValueError(f"the selector reads a width of {read}, the block has {width}")
        gate = dense.get("gate", {})
        weights = BlockWeights(
            up=up,
            down=dense["down"]["weight"].T,
            gate=gate.get("weight"),
            up_bias=dense["up"].get("bias"),
            gate_bias=gate.get("bias"),
            down_bias=dense["down"].get("bias"),
        )
        return cls(weights=weights, selector=selector, unions=tuple(unions))

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
        selected = self.selector(sites or (x,))
        y = block_mlp(
            self.weights, x.reshape(-1, x.shape[-1]), selected, activation=cfg.activation,
            listed=self.lists(len(selected), backend), backend=backend,
        )  # fmt: skip
        return y.astype(x.dtype).reshape(x.shape)

    def union(self, rows: int) -> float:
        """The share of the blocks that `rows` tokens are expected to use together."""
        place = max(rows - 1, 0).bit_length()
        if place < len(self.unions):
            return self.unions[place]
        known = self.unions[-1] if self.unions else self.selector.share()
        left = rows / 2 ** max(len(self.unions) - 1, 0)
        return 1 - (1 - known) ** left

    def lists(self, rows: int, backend: Backend | None = None) -> bool:
        """Whether a step of `rows` tokens reads listed blocks instead of all."""
        kind = "gpu" if backend is None or backend.has_kernels else "cpu"
        if kind == "cpu" and self.block_size < SMALLEST_BLOCK:
            return False
        return self.union(rows) < PAYS[kind]

    def read_bytes(self, rows: int = 1, backend: Backend | None = None) -> int:
        """Bytes of parameters that a step of `rows` tokens reads, the selector's included."""
        share = self.union(rows) if self.lists(rows, backend) else 1.0
        w = self.weights
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights))
        fixed = sum(leaf.nbytes for leaf in (w.down_bias, w.down_scale) if leaf is not None)
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(self.selector))
        return own + fixed + round(share * (whole - fixed))
