"""How a device stores a cache and computes with it: one value that travels through a step."""

from dataclasses import dataclass

import jax

from pallas_kernels.dispatch import Implementation, KeyLayout, check_implementation, check_layout

CPU_BLOCK = 128  # slots


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Layout of keys, slots that are read at a time, and who computes; static.

    XLA CPU wants keys transposed (it would transpose the whole cache for each product) and reads
    `block` slots at a time up to the live length; a GPU reads everything at once (None).
    `implementation` chooses between the Pallas kernels and their `jnp` references, see
    `pallas_kernels.dispatch.dispatch`. Kernels read keys in the layout "BKSH" only, and a CPU never
    traces one, so that "BKHS" goes with "reference". `axis` names the mesh axis over which the
    devices of a stage divide heads and widths (`jaxinfer.parallel.shard`), inside `jax.shard_map`.
    """

    layout: KeyLayout = "BKHS"
    block: int | None = CPU_BLOCK
    implementation: Implementation | None = "reference"
    axis: str | None = None

    def __post_init__(self):
        check_layout(self.layout, self.implementation)

    @classmethod
    def of(
        cls, implementation: Implementation | None = None, platform: str | None = None
    ) -> "Backend":
        """The backend of `platform` ("cpu", "gpu"; default: the one that JAX uses).

        Args:
          implementation: None takes kernels on a CUDA device and XLA elsewhere. "triton" and
            "interpret" name the kernels and have the layout of a GPU anywhere; "reference" names
            XLA.
          platform: as `jax.default_backend` names it.

        Raises:
          ValueError: an unknown implementation.
        """
        check_implementation(implementation)
        on_cpu = implementation not in ("triton", "interpret") and (
            (platform or jax.default_backend()) == "cpu"
        )
        if on_cpu:
            return cls()
        return cls(layout="BKSH", block=None, implementation=implementation)

    @property
    def has_kernels(self) -> bool:
        """Whether a step may run kernels."""
        return self.implementation != "reference"
