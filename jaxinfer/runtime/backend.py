"""How a device stores a cache and computes with it: one value that travels through a step."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax

from jaxinfer.cpu_kernels import loading
from pallas_kernels import dispatch
from pallas_kernels.dispatch import KeyLayout, check_layout

Implementation = Literal["reference", "ffi", "triton", "interpret"]
CPU_BLOCK = 128  # slots


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Layout of keys, slots that are read at a time, and who computes; static.

    XLA CPU wants keys transposed (it would transpose the whole cache for each product) and reads
    `block` slots at a time up to the live length; a GPU reads everything at once (None).
    `implementation` chooses between the Pallas kernels and their `jnp` references, see
    `pallas_kernels.dispatch.dispatch`. Kernels read keys in the layout "BKSH" only, and a CPU never
    traces one, so that "BKHS" goes with "reference". `cpu_kernels` says whether those of
    `jaxinfer.cpu_kernels` compute what they can. `axis` names the mesh axis over which the
    devices of a stage divide heads and widths (`jaxinfer.parallel.shard`), inside `jax.shard_map`.
    """

    layout: KeyLayout = "BKHS"
    block: int | None = CPU_BLOCK
    implementation: dispatch.Implementation | None = "reference"
    cpu_kernels: bool = False
    axis: str | None = None

    def __post_init__(self):
        check_layout(self.layout, self.implementation)

    @classmethod
    def of(
        cls, implementation: Implementation | None = None, platform: str | None = None
    ) -> "Backend":
        """The backend of `platform` ("cpu", "gpu"; default: the one that JAX uses).

        Args:
          implementation: None takes the kernels of the device, where they can compute, and XLA
            otherwise. "triton" and "interpret" name the GPU's kernels and have their layout
            anywhere, "ffi" names the CPU's; "reference" names XLA.
          platform: as `jax.default_backend` names it.

        Raises:
          ValueError: an unknown implementation, or "ffi" where the CPU's kernels cannot compute.
        """
        check_implementation(implementation)
        platform = platform or jax.default_backend()
        if implementation == "ffi":
            loading.require()
            if platform != "cpu":
                raise ValueError(f"implementation='ffi' needs a CPU, JAX uses {platform!r}")
            return cls(cpu_kernels=True)
        if platform == "cpu" and implementation not in ("triton", "interpret"):
            return cls(cpu_kernels=implementation is None and loading.available())
        return cls(layout="BKSH", block=None, implementation=implementation)

    @property
    def has_kernels(self) -> bool:
        """Whether a step may run the kernels of a GPU."""
        return self.implementation != "reference"


def check_implementation(name: str | None) -> None:
    """Raises unless `name` is None or an `Implementation`."""
    dispatch.check_implementation(name, get_args(Implementation))
