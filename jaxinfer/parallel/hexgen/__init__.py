"""Plans for serving a model on unequal machines (HexGen, arXiv 2311.11514): `ji.hexgen`.

Which accelerators form a replica, how its layers are split into stages, and with which tensor
parallelism each stage runs: `schedule` decides it from a cost model, `simulate` replays requests on
the result, and `serve` runs it.
"""

from jaxinfer.parallel.hexgen.bound import capacity_bound
from jaxinfer.parallel.hexgen.budget import GpuOffer, cheapest_mix
from jaxinfer.parallel.hexgen.costs import Assumptions, Costs
from jaxinfer.parallel.hexgen.groups import Budget, Rules
from jaxinfer.parallel.hexgen.inventory import Cluster, Gpu, Link, Machine
from jaxinfer.parallel.hexgen.layouts import (
    Layout,
    Stage,
    StageTable,
    best_layout,
    frontier,
    symmetric_layout,
)
from jaxinfer.parallel.hexgen.outcome import Simulation
from jaxinfer.parallel.hexgen.placed import PlacedStage
from jaxinfer.parallel.hexgen.plan import Plan
from jaxinfer.parallel.hexgen.probe import probe
from jaxinfer.parallel.hexgen.schedule import schedule
from jaxinfer.parallel.hexgen.serving import serve
from jaxinfer.parallel.hexgen.simulate import peak_rate, simulate
from jaxinfer.parallel.hexgen.sizes import ModelSizes
from jaxinfer.parallel.hexgen.workload import Trace, Workload

__all__ = [
    "Assumptions",
    "Budget",
    "Cluster",
    "Costs",
    "Gpu",
    "GpuOffer",
    "Layout",
    "Link",
    "Machine",
    "ModelSizes",
    "PlacedStage",
    "Plan",
    "Rules",
    "Simulation",
    "Stage",
    "StageTable",
    "Trace",
    "Workload",
    "best_layout",
    "capacity_bound",
    "cheapest_mix",
    "frontier",
    "peak_rate",
    "probe",
    "schedule",
    "serve",
    "simulate",
    "symmetric_layout",
]
