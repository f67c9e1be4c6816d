"""The run-time type checker of the tests: beartype, where an int will do for a float.

What users call is left out: it refuses wrong arguments itself, with a line that tests read.
"""

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype

Checked = TypeVar("Checked", bound=Callable)
REFUSES_ITSELF = {
    "jaxinfer.decode.batcher",
    "jaxinfer.decode.model",
    "jaxinfer.decode.options",
    "jaxinfer.distill.filters.distill",
    "jaxinfer.io.chat_template",
    "jaxinfer.decode.sampling",
    "jaxinfer.decode.serving",
    "jaxinfer.decode.slot_requests",
    "jaxinfer.forms",
    "jaxinfer.lm",
    "jaxinfer.models.filter_form",
    "jaxinfer.loading",
    "jaxinfer.names",
    "jaxinfer.serve.config",
    "jaxinfer.service",
    "jaxinfer.parallel.hexgen.budget",
    "jaxinfer.parallel.hexgen.costs",
    "jaxinfer.parallel.hexgen.groups",
    "jaxinfer.parallel.hexgen.inventory",
    "jaxinfer.parallel.hexgen.plan",
    "jaxinfer.parallel.hexgen.schedule",
    "jaxinfer.parallel.hexgen.simulate",
    "jaxinfer.parallel.hexgen.sizes",
    "jaxinfer.parallel.hexgen.workload",
    "jaxinfer.session",
    "jaxinfer.sparsity.trained",
    "jaxinfer.speculative.speculate",
    "jaxinfer.speculative.speculator",
    "jaxinfer.theory.joma.contexts",
    "jaxinfer.theory.joma.discrete",
    "jaxinfer.theory.joma.dynamics",
    "jaxinfer.theory.joma.grammar",
    "jaxinfer.theory.joma.hierarchy",
    "jaxinfer.theory.joma.invariants",
    "jaxinfer.theory.joma.trainer",
    "jaxinfer.theory.transport.certified",
    "jaxinfer.theory.transport.divergence",
}


def checked(function: Checked) -> Checked:
    if function.__module__ in REFUSES_ITSELF:
        return function
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
