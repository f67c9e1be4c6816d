"""What the feed-forward blocks of a sparse model are expected to read in a step."""

from jaxinfer.cache.base import bytes_of
from jaxinfer.runtime.backend import Backend
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Json, Params


def block_facts(params: Params, rows: int, backend: Backend) -> list[Json]:
    """For each layer: its `blocks` and their `block_size` in neurons, None where it is dense; the
    share of the blocks that a token uses (`density`) and that `rows` tokens use together
    (`step_density`), both as expected; whether a step of so many tokens reads a list of them
    (`listed`) or all; `bytes` of its parameters, and `read_bytes`, what the step reads of them."""
    return [_facts(i, layer["mlp"], rows, backend) for i, layer in enumerate(params["layers"])]


def _facts(index: int, block: object, rows: int, backend: Backend) -> Json:
    size = bytes_of(block)
    if not isinstance(block, SparseMlp):
        return {
            "layer": index, "blocks": None, "block_size": None, "density": 1.0,
            "step_density": 1.0, "listed": False, "bytes": size, "read_bytes": size,
        }  # fmt: skip
    return {
        "layer": index,
        "blocks": block.selector.units,
        "block_size": block.block_size,
        "density": block.union(1),
        "step_density": block.union(rows),
        "listed": block.lists(rows, backend),
        "bytes": size,
        "read_bytes": block.read_bytes(rows, backend),
    }
