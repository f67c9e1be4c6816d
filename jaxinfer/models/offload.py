"""Weights that live in host memory and visit the device layer by layer.

A step then reads all weights over the bus, which takes as long for a tree of hundreds of nodes as
for one token (arXiv 2402.12374, section 4.3): speculation is what makes this mode bearable.
`fetched` stands in the layer loop; XLA overlaps the transfer of a layer with the work of those
before it where the back end can. Arrays on the device pass through untouched.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxinfer.arguments import whole
from jaxinfer.typing import Params

PCIE4 = 25e9  # bytes per second that PCIe 4.0 x16 reaches; 31.5e9 on paper


def fetched(layer: Params) -> Params:
    """One layer's parameters in device memory; only under `jax.jit`."""

    def one(x: Any) -> Any:
        away = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if away else x

    return jax.tree.map(one, layer)


def in_host_memory(params: Params, stay: int = 0) -> Params:
    """The parameters with all layers but the first `stay` in page-locked host memory; embedding,
    head and final norm stay on the device.

    Raises ValueError where the back end has no such memory.
    """
    stay = whole("stay", stay, least=0, most=len(params["layers"]))
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    if "pinned_host" not in kinds:
        raise ValueError(
            f"{jax.default_backend()} has no page-locked host memory (only {', '.join(kinds)}); "
            "load the model without offloading"
        )
    put: Callable[[Any], Any] = lambda x: jax.device_put(  # noqa: E731
        x, x.sharding.with_memory_kind("pinned_host")
    )
    layers = params["layers"]
    return params | {"layers": (*layers[:stay], *jax.tree.map(put, tuple(layers[stay:])))}


def transfer_seconds(params: Params, bandwidth: float = PCIE4) -> float:
    """The least time of a step: bytes of the layers in host memory over the bus."""
    leaves = jax.tree.leaves(params["layers"])
    size = sum(x.nbytes for x in leaves if jax.typeof(x).memory_space == jax.memory.Space.Host)
    return size / bandwidth
