"""A plan: which accelerators serve which layers. A JSON file with a version.

A file is checked as what it is, input from outside: machines and accelerators exist, none is used
twice, layers follow each other without a gap, and the weights and caches of every stage fit. What
it predicts is computed again from what it holds, never read.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxinfer.arguments import of_kind, real, shown, whole
from jaxinfer.files import one_line, quoted, read_json, write_json
from jaxinfer.parallel.hexgen.costs import GIB, Assumptions, Costs
from jaxinfer.parallel.hexgen.inventory import Cluster
from jaxinfer.parallel.hexgen.layouts import Stage
from jaxinfer.parallel.hexgen.placed import PlacedStage, replica_from
from jaxinfer.parallel.hexgen.sizes import ModelSizes
from jaxinfer.parallel.hexgen.workload import Workload
from jaxinfer.typing import Json

VERSION = 1
FILE_LIMIT = 16 * 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Replicas of a model, each a pipeline of stages, and what they were planned with.

    `attainment` is the part of the planned requests that met the deadline in the search.
    """

    cluster: Cluster
    model: ModelSizes
    workload: Workload
    assumptions: Assumptions
    replicas: tuple[tuple[PlacedStage, ...], ...]
    attainment: float | None = None

    def __post_init__(self):
        if self.attainment is not None:
            real("attainment", self.attainment, 0.0, 1.0)
        whole("the number of replicas", len(self.replicas), 1, 2**16)
        used: set[tuple[int, int]] = set()
        for number, stages in enumerate(self.replicas):
            self._check_replica(f"replica {number}", stages, used)

    def _check_replica(
        self, name: str, stages: tuple[PlacedStage, ...], used: set[tuple[int, int]]
    ) -> None:
        expected = 0
        for i, one in enumerate(stages):
            whole(f"machine of {name}", one.machine, 0, len(self.cluster.machines) - 1)
            if len(one.devices) not in self.assumptions.degrees:
                raise ValueError(
                    f"stage {i} of {name} has {len(one.devices)} devices; the plan's degrees are "
                    f"{self.assumptions.degrees}"
                )
            machine = self.cluster.machines[one.machine]
            for device in one.devices:
                whole(f"device of {name} on {quoted(machine.name)}", device, 0, machine.count - 1)
                if (one.machine, device) in used:
                    raise ValueError(f"device {device} of {quoted(machine.name)} is used twice")
                used.add((one.machine, device))
            if one.first != expected or not one.first < one.stop <= self.model.layers:
                raise ValueError(
                    f"stage {i} of {name} has layers {one.first} to {one.stop}, expected from "
                    f"{expected} to at most {self.model.layers}, with one layer or more"
                )
            expected = one.stop
            self._check_memory(f"stage {i} of {name}", one, i == 0, i + 1 == len(stages))
        if expected != self.model.layers:
            raise ValueError(f"{name} has {expected} layers of {self.model.layers}")

    def _check_memory(self, name: str, one: PlacedStage, first: bool, last: bool) -> None:
        needed = self.costs.memory_bytes(
            len(one.devices), one.stop - one.first, first, last, self.workload.context
        )
        room = self.costs.room_bytes(one.machine)
        if needed > room * (1 + 1e-9):
            raise ValueError(
                f"{name} needs {needed / GIB:.2f} GiB on each device, of which {room / GIB:.2f} "
                "may be used"
            )

    @property
    def costs(self) -> Costs:
        """The cost model that the plan was made with."""
        return Costs(self.cluster, self.model, self.assumptions)

    @property
    def stages(self) -> tuple[tuple[Stage, ...], ...]:
        """Every replica's stages without the names of the accelerators."""
        return tuple(tuple(one.stage for one in stages) for stages in self.replicas)

    @property
    def idle(self) -> tuple[tuple[int, ...], ...]:
        """The accelerators of every machine that serve nothing."""
        free = [set(range(machine.count)) for machine in self.cluster.machines]
        for stages in self.replicas:
            for one in stages:
                free[one.machine] -= set(one.devices)
        return tuple(tuple(sorted(devices)) for devices in free)

    @property
    def inputs_hash(self) -> str:
        """SHA-256 of everything the plan was made for: cluster, model, workload, assumptions."""
        text = json.dumps(self._inputs(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def _inputs(self) -> Json:
        names = ("cluster", "model", "workload", "assumptions")
        # through JSON, in which tuples are lists
        return json.loads(json.dumps({name: getattr(self, name).to_dict() for name in names}))

    @classmethod
    def of(
        cls,
        costs: Costs,
        workload: Workload,
        pipelines: Sequence[tuple[Stage, ...]],
        attainment: float | None = None,
    ) -> "Plan":
        """The plan of some pipelines; each machine's accelerators are given out in order."""
        taken = [0] * len(costs.cluster.machines)
        replicas = []
        for stages in pipelines:
            placed, layer = [], 0
            for machine, degree, layers in stages:
                devices = tuple(range(taken[machine], taken[machine] + degree))
                placed.append(PlacedStage(machine, devices, layer, layer + layers))
                taken[machine] += degree
                layer += layers
            replicas.append(tuple(placed))
        return cls(
            cluster=costs.cluster,
            model=costs.model,
            workload=workload,
            assumptions=costs.assumptions,
            replicas=tuple(replicas),
            attainment=attainment,
        )

    def predicted(self) -> list[Json]:
        """Of every replica, for the mean request: seconds alone (`latency_s`), between two requests
        under load (`bottleneck_s`) and of each stage, and each stage's bytes per device."""
        load, costs = self.workload, self.costs
        table = costs.table(load.mean_prompt, load.mean_output, load.context)
        found = []
        for stages in self.stages:
            layout = table.layout(stages)
            ends = [(i == 0, i + 1 == len(stages)) for i in range(len(stages))]
            pairs = list(zip(stages, ends, strict=True))
            found.append({
                "latency_s": layout.latency_s,
                "bottleneck_s": layout.bottleneck_s,
                "stage_s": [
                    float(costs.stage_s(*one, last, load.mean_prompt, load.mean_output))
                    for one, (_, last) in pairs
                ],
                "memory_bytes": [
                    costs.memory_bytes(one.degree, one.layers, first, last, load.context)
                    for one, (first, last) in pairs
                ],
            })  # fmt: skip
        return found

    @property
    def capacity(self) -> float:
        """Mean requests per second that all replicas together can serve without end."""
        return float(np.sum([1.0 / one["bottleneck_s"] for one in self.predicted()]))

    def explain(self) -> str:
        """A table of the replicas and their stages: machine, devices, layers, seconds, memory."""
        lines = []
        for number, (placed, facts) in enumerate(zip(self.replicas, self.predicted(), strict=True)):
            lines.append(
                f"replica {number}: {facts['latency_s']:.4g} s alone, "
                f"{1 / facts['bottleneck_s']:.4g} requests/s"
            )
            rows = zip(placed, facts["stage_s"], facts["memory_bytes"], strict=True)
            for one, seconds, memory in rows:
                machine = self.cluster.machines[one.machine]
                room = self.costs.room_bytes(one.machine)
                lines.append(
                    f"  {machine.name}: {len(one.devices)} x {machine.gpu.name}, layers "
                    f"{one.first}-{one.stop - 1}, {seconds:.4g} s, {memory / GIB:.2f} of "
                    f"{room / GIB:.2f} GiB"
                )
        for machine, devices in zip(self.cluster.machines, self.idle, strict=True):
            if devices:
                lines.append(f"idle on {machine.name}: {len(devices)} x {machine.gpu.name}")
        if self.attainment is not None:
            lines.append(
                f"{self.attainment:.1%} of requests within {self.workload.deadline_s:g} s at "
                f"{self.workload.requests_per_s:g} requests/s"
            )
        return "\n".join(lines)

    def to_dict(self) -> Json:
        """A JSON-ready dictionary; `Plan.from_dict` reads it back."""
        names = [machine.name for machine in self.cluster.machines]
        replicas = [
            {"stages": [one.to_dict(names) for one in stages], "predicted": facts}
            for stages, facts in zip(self.replicas, self.predicted(), strict=True)
        ]
        head = {"version": VERSION, "inputs_hash": self.inputs_hash}
        return head | self._inputs() | {"replicas": replicas, "attainment": self.attainment}

    @classmethod
    def from_dict(cls, data: Json) -> "Plan":
        """The plan that `to_dict` wrote.

        Raises:
            ValueError: anything in it is missing, out of range, or contradicts the rest.
        """
        if data.get("version") != VERSION:
            raise ValueError(
                f"version of a plan must be {VERSION}, got {shown(data.get('version'))}"
            )
        for name in ("cluster", "model", "workload", "assumptions"):
            of_kind(name, data.get(name), dict, "an object")
        cluster = Cluster.from_dict(data["cluster"])
        names = {machine.name: i for i, machine in enumerate(cluster.machines)}
        of_kind("replicas", data.get("replicas"), list, "a list")
        found = cls(
            cluster=cluster,
            model=ModelSizes.from_dict(data["model"]),
            workload=Workload.from_dict(data["workload"]),
            assumptions=Assumptions.from_dict(data["assumptions"]),
            replicas=tuple(replica_from(one, names) for one in data["replicas"]),
            attainment=data.get("attainment"),
        )
        if data.get("inputs_hash") != found.inputs_hash:
            raise ValueError(
                "inputs_hash is not that of the plan's cluster, model, workload and assumptions; "
                "make the plan again"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Writes the JSON file in one step."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """The plan of a JSON file; ValueError, naming the file, where it holds none."""
        data = read_json(Path(path), FILE_LIMIT)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{one_line(path, 1000)}: {error}") from error
