"""Which replica a request goes to."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from jaxinfer.arguments import one_of

Policy = Literal["least_finish", "round_robin", "shortest_queue", "power_of_two"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Router:
    """Chooses among the replicas that are alive.

    "least_finish" takes the one that is expected to finish the request first, "round_robin" each in
    turn, "shortest_queue" the one with the fewest requests, and "power_of_two" the shorter queue of
    two by lot. Of equal ones the first is taken.
    """

    def __init__(self, policy: Policy, seed: int = 0):
        self.policy = one_of("router", policy, POLICIES)
        self._random = np.random.default_rng(seed)
        self._turn = 0

    def choose(
        self,
        alive: Sequence[int],
        finish_s: Callable[[int], float],
        queued: Callable[[int], int],
    ) -> int:
        """One of `alive`; the functions say when a replica would finish the request, and how many
        it has."""
        if self.policy == "least_finish":
            return min(alive, key=finish_s)
        if self.policy == "shortest_queue":
            return min(alive, key=queued)
        if self.policy == "power_of_two":
            two = self._random.choice(len(alive), min(2, len(alive)), replace=False)
            return min((alive[i] for i in sorted(two)), key=queued)
        self._turn += 1
        return alive[(self._turn - 1) % len(alive)]
