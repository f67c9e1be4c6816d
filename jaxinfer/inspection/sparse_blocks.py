"""What the feed-forward blocks of a sparse model are expected to read in a step."""

from jaxinfer.cache.base import bytes_of
from jaxinfer.nn.mlp import FeedForward
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.heads import SparseHeads
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Json, Params


def block_facts(params: Params, rows: int, backend: Backend) -> list[Json]:
    """For each layer: its `blocks` and their `block_size` in neurons, None where it has none; the
    share of the blocks that a token uses (`density`; of a threshold the measured one) and that
    `rows` tokens use together (`step_density`), None where only running it tells; the share below
    which a step reads a list of them (`pays_below`), and whether one of so many tokens does
    (`listed`) or reads all; `bytes` of its parameters, and
    `read_bytes`, what the step reads of them. `head_density` is the share of the groups of heads
    that a token uses."""
    return [
        {"layer": index}
        | _of_block(layer["mlp"], rows, backend)
        | {"head_density": _head_density(layer)}
        for index, layer in enumerate(params["layers"])
    ]


def _head_density(layer: Params) -> float:
    heads = layer["attn"].get("heads") if "attn" in layer else None
    return heads.union(1) if isinstance(heads, SparseHeads) else 1.0


def _of_block(block: object, rows: int, backend: Backend) -> Json:
    if not isinstance(block, SparseMlp):
        size = bytes_of(block)
        share, read = 1.0, size
        if isinstance(block, FeedForward):
            share, read = None, block.read_bytes(rows, backend)
        return {
            "blocks": None, "block_size": None, "density": share, "step_density": share,
            "pays_below": 0.0, "listed": False, "bytes": size, "read_bytes": read,
        }  # fmt: skip
    return {
        "blocks": block.selector.units,
        "block_size": block.block_size,
        "density": block.union(1),
        "step_density": block.union(rows),
        "pays_below": block.pays_below(backend, rows),
        "listed": block.lists(rows, backend),
        "bytes": bytes_of(block),
        "read_bytes": block.read_bytes(rows, backend),
    }
