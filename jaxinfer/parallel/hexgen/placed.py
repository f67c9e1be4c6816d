"""A stage in its place: which accelerators of which machine have which layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxinfer.arguments import of_kind, shown, whole
from jaxinfer.parallel.hexgen.costs import MOST_DEGREE
from jaxinfer.parallel.hexgen.inventory import MOST_GPUS
from jaxinfer.parallel.hexgen.layouts import Stage
from jaxinfer.parallel.hexgen.sizes import MOST_LAYERS
from jaxinfer.typing import Json


@dataclass(frozen=True)
class PlacedStage:
    """The layers `first` to `stop` - 1 on some accelerators of one machine."""

    machine: int
    devices: tuple[int, ...]
    first: int
    stop: int

    @property
    def stage(self) -> Stage:
        """Without the names of the accelerators."""
        return Stage(self.machine, len(self.devices), self.stop - self.first)

    def to_dict(self, names: Sequence[str]) -> Json:
        """A JSON-ready dictionary; machines have names there."""
        return {
            "machine": names[self.machine],
            "devices": list(self.devices),
            "layers": [self.first, self.stop],
        }


def replica_from(data: object, names: Mapping[str, int]) -> tuple[PlacedStage, ...]:
    """The stages of a replica in a plan's file; `names` has the number of every machine."""
    of_kind("a replica", data, dict, "an object")
    assert isinstance(data, dict)
    stages = data.get("stages")
    of_kind("stages of a replica", stages, list, "a list")
    assert isinstance(stages, list)
    whole("the number of stages", len(stages), 1, MOST_LAYERS)
    return tuple(_placed(one, names) for one in stages)


def _placed(data: object, names: Mapping[str, int]) -> PlacedStage:
    of_kind("a stage", data, dict, "an object")
    assert isinstance(data, dict)
    machine, devices, layers = (data.get(name) for name in ("machine", "devices", "layers"))
    if not isinstance(machine, str) or machine not in names:
        raise ValueError(f"no machine is called {shown(machine)}")
    if not isinstance(devices, list) or not 0 < len(devices) <= MOST_DEGREE:
        raise ValueError(f"devices must be 1 to {MOST_DEGREE} numbers, got {shown(devices)}")
    if not isinstance(layers, list) or len(layers) != 2:
        raise ValueError(f"layers must be a pair of numbers, got {shown(layers)}")
    numbers = tuple(whole("a device", device, 0, MOST_GPUS) for device in devices)
    first, stop = (whole("a layer", layer, 0, MOST_LAYERS) for layer in layers)
    return PlacedStage(names[machine], numbers, first, stop)
