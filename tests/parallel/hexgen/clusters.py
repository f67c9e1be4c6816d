"""The clusters of hexgen.md, sections 5.2 to 5.4, with the links that are assumed there."""

from jaxinfer.parallel.hexgen.inventory import Cluster, Gpu, Link, Machine

GIB = 2**30
GPUS = {
    name: Gpu(
        name=name, memory_bytes=memory * GIB, bytes_per_s=rate * 1e9, flops_per_s=flops * 1e12
    )
    for name, memory, rate, flops in (
        ("A100", 40, 1555, 312), ("3090Ti", 24, 1008, 80), ("A5000", 24, 768, 111),
        ("A6000", 48, 768, 155), ("A40", 48, 696, 150), ("A4000", 16, 448, 76.7),
    )
}  # fmt: skip
INSIDE = Link(latency_s=5e-6, bytes_per_s=12e9)
SAME = Link(latency_s=2e-4, bytes_per_s=1.25e9)
FAR = Link(latency_s=2e-2, bytes_per_s=1.25e8)


def cluster(
    *machines: tuple[str, int, str], inside: Link = INSIDE, same: Link = SAME, far: Link = FAR
) -> Cluster:
    """Machines as (gpu, count, region)."""
    made = tuple(
        Machine(name=f"m{i}", gpu=GPUS[gpu], count=count, region=region, link=inside)
        for i, (gpu, count, region) in enumerate(machines)
    )
    return Cluster(machines=made, same_region=same, other_regions=far)
