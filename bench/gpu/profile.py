"""What a step launches and how long each kernel takes, as the device's profiler saw it.

Kernels that XLA numbers (`fusion_3`, `kivi_attention_12`) are one line each kind. What the busy
time lacks of the step's is the device waiting for the next launch.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

MOST_KINDS = 30


def profiled(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Launches and busy microseconds of each of the `steps` that `run()` takes, and their kinds;
    nothing where the profiler sees no device."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        found = kinds(launches(Path(folder)))
    if not found:
        return {}
    return {
        "busy_us": sum(us for _, us in found.values()) / steps,
        "launches": sum(count for count, _ in found.values()) / steps,
        "kernels": [
            {"name": name, "launches": count / steps, "us": us / steps}
            for name, (count, us) in list(found.items())[:MOST_KINDS]
        ],
    }


def launches(folder: Path) -> Iterable[tuple[str, float]]:
    """The name and microseconds of everything that ran on a device's streams."""
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from ((event.name, event.duration_ns / 1e3) for event in line.events)


def kinds(events: Iterable[tuple[str, float]]) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kind, the dearest first.

    Example:
      >>> kinds([("fusion_1", 2.0), ("add.2", 1.0), ("fusion_22", 3.0)])
      {'fusion': (2, 5.0), 'add': (1, 1.0)}
    """
    total: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, us in events:
        kind = total[re.sub(r"([._]\d+)+$", "", name)]
        kind[0] += 1
        kind[1] += us
    ordered = sorted(total.items(), key=lambda item: -item[1][1])
    return {name: (int(count), us) for name, (count, us) in ordered}
