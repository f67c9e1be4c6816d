"""How many requests per second no plan can exceed: an integer programme.

A replica that serves x requests per second has x l c <= 1 for each stage of l layers, each of which
takes c seconds. Added up over its stages, x times the layers of the model is at most the sum of
1 / c, whatever the split. So the capacity of all replicas is at most that of the best division of
every machine into stages, as if layers could be split finely, hops cost nothing and memory had no
end.
"""

import numpy as np

from jaxinfer.parallel.hexgen.layouts import Counts, StageTable


def capacity_bound(table: StageTable, counts: Counts, layers: int) -> float:
    """An upper bound of the requests per second that any plan serves without end.

    Args:
        table: the times of the stages.
        counts: accelerators of each machine.
        layers: of the model.
    """
    from scipy.optimize import milp

    machines, degrees = table.layer_s.shape
    rate = 1.0 / (table.layer_s * layers)
    # the unknowns, none below 0: stages[machine, degree]
    uses = np.zeros((machines, machines * degrees))
    for m in range(machines):
        uses[m, m * degrees : (m + 1) * degrees] = table.degrees
    found = milp(
        -rate.reshape(-1),
        constraints=(uses, -np.inf, np.array(counts, float)),
        integrality=np.ones(rate.size),
    )
    return float(-found.fun)
