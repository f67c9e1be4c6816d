"""`serve`: a plan in processes of this machine, one for each of its stages."""

import os
from collections.abc import Mapping

from jaxinfer.arguments import of_kind, whole
from jaxinfer.config import ModelConfig
from jaxinfer.decode.batcher import Batcher
from jaxinfer.io.dtypes import DType
from jaxinfer.io.load import load_checkpoint
from jaxinfer.parallel.hexgen.plan import Plan
from jaxinfer.parallel.pipeline import Pipeline, StageShape


def serve(
    plan: Plan,
    source: str | os.PathLike[str],
    *,
    policy: str | Mapping[str, object] = "full",
    slots: int = 8,
    context: int = 2048,
    queue: int = 64,
    dtype: DType = None,
    replica: int = 0,
) -> Batcher:
    """A batcher whose model runs in the stages of a plan's replica.

    Every stage is a process of this machine that reads its own layers; one that a plan gives
    several accelerators has as many virtual devices on a CPU. A stage that dies is started again
    and texts go on as if nothing had happened.

    Args:
        plan: what `ji.hexgen.schedule` found for this model.
        source: the model, as `ji.load` takes it.
        policy: how caches keep tokens: a name, or a mapping with "name" and arguments.
        slots: requests that run at once.
        context: tokens of a request, prompt and answer together.
        queue: requests that wait at most.
        dtype: of the parameters, as in `ji.load`.
        replica: which of the plan's.

    Returns:
        A batcher, to be closed when no longer needed, or by `with`.

    Raises:
        ValueError: the plan is one of another model, or a stage cannot serve its part.
        RuntimeError: the processes could not be started.
    """
    of_kind("plan", plan, Plan, "a Plan")
    whole("replica", replica, 0, len(plan.replicas) - 1)
    check_plan(plan, load_checkpoint(source, dtype, layers=range(0)).config)
    stages = [
        StageShape(range(one.first, one.stop), len(one.devices)) for one in plan.replicas[replica]
    ]
    pipeline = Pipeline(source, stages, policy=policy, slots=slots, context=context, dtype=dtype)
    return Batcher(pipeline, queue)


def check_plan(plan: Plan, config: ModelConfig) -> None:
    """Refuses a plan that was made for a model of other sizes.

    Raises:
        ValueError: it was.
    """
    sizes = plan.model
    theirs = {
        "layers": sizes.layers, "hidden size": sizes.hidden, "key/value heads": sizes.kv_heads,
        "feed-forward width": sizes.mlp_width,
    }  # fmt: skip
    ours = {
        "layers": config.num_layers, "hidden size": config.hidden_size,
        "key/value heads": config.num_kv_heads, "feed-forward width": config.intermediate_size,
    }  # fmt: skip
    for name, number in ours.items():
        if theirs[name] != number:
            raise ValueError(
                f"the plan is for a model with {theirs[name]} {name}, this one has {number}; make "
                "a plan with `jaxinfer plan --model` of this model"
            )
