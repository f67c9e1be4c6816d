"""What is measured: each routine takes `Options` and returns its records."""

from collections.abc import Callable

from bench.options import Options
from bench.routines import context_scaling, decode, prefill, recurrence, serving, sparsity, startup
from jaxinfer.environment import environment
from jaxinfer.plugins import meant
from jaxinfer.records import Record

Routine = Callable[[Options], list[tuple[dict, dict]]]
"""Returns (config, metrics) pairs."""

ROUTINES: dict[str, Routine] = {
    "decode": decode.run,
    "prefill": prefill.run,
    "context-scaling": context_scaling.run,
    "startup": startup.run,
    "sparsity": sparsity.run,
    "recurrence": recurrence.run,
    "serving": serving.run,
}


def run(name: str, options: Options) -> list[Record]:
    """The records of one routine, not yet written."""
    if name not in ROUTINES:
        raise ValueError(
            f"no benchmark {name!r}{meant(name, ROUTINES)} choose one of "
            f"{', '.join(ROUTINES)}, all or report"
        )
    env = environment()
    return [
        Record(
            name=name,
            config=config,
            metrics=metrics,
            env=env | {"device": metrics.pop("device", None)},
            command=options.command(name),
            seed=options.seed,
        )
        for config, metrics in ROUTINES[name](options)
    ]
