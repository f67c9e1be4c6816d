"""The cheapest mix of accelerators for a workload: an integer programme.


Melange (arXiv 2404.14527). Requests are sorted into classes by size, each class is cut into slices,
and every slice goes to one kind of accelerator. A request of class c takes 1 / rate[c] of a second
of an accelerator that serves `rate[c]` of them per second; the loads of a kind, added up, must fit
into a whole number of its accelerators, each with its price.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.arguments import real, whole

MOST_CHOICES = 2048  # kinds of accelerators times slices; the programme is a dense matrix


@dataclass(frozen=True, kw_only=True)
class GpuOffer:
    """A kind of accelerator that can be rented.

    `requests_per_s[c]` is how many requests of class c one of them serves per second within their
    deadline; 0 where it cannot. `available` None is without limit.
    """

    name: str
    price_per_hour: float
    requests_per_s: tuple[float, ...]
    available: int | None = None

    def __post_init__(self):
        real(f"price_per_hour of {self.name!r}", self.price_per_hour, 0.0, 1e9)
        for rate in self.requests_per_s:
            real(f"requests_per_s of {self.name!r}", rate, 0.0, 1e9)
        if self.available is not None:
            whole(f"available of {self.name!r}", self.available, 0)


def cheapest_mix(
    offers: Sequence[GpuOffer], requests_per_s: Sequence[float], *, slices: int = 8
) -> dict[str, int]:
    """How many accelerators of each kind serve all requests for the least price per hour.

    Args:
        offers: the kinds.
        requests_per_s: the rate of every class of requests.
        slices: of each class, which may go to different kinds.

    Raises:
        ValueError: arguments out of range, or no mix serves them all.
    """
    from scipy.optimize import LinearConstraint, milp

    slices = whole("slices", slices, 1, MOST_CHOICES)
    for rate in requests_per_s:
        real("requests_per_s", rate, 0.0, 1e9)
    kinds, parts = len(offers), len(requests_per_s) * slices
    whole("kinds of accelerators times slices of all classes", kinds * parts, 1, MOST_CHOICES)
    if any(len(offer.requests_per_s) != len(requests_per_s) for offer in offers):
        raise ValueError(f"every offer needs {len(requests_per_s)} rates, one for each class")
    served = np.array([offer.requests_per_s for offer in offers], float).repeat(slices, 1)
    demand = np.array(requests_per_s, float).repeat(slices) / slices
    can = (served > 0) | (demand == 0)
    load = np.divide(demand, served, out=np.zeros_like(served), where=served > 0)

    # the unknowns: takes[kind, slice], then how many of each kind
    price = np.array([0.0] * kinds * parts + [offer.price_per_hour for offer in offers])
    each_once = np.hstack([np.tile(np.eye(parts), kinds), np.zeros((parts, kinds))])
    fits = np.zeros((kinds, len(price)))
    for k in range(kinds):
        fits[k, k * parts : (k + 1) * parts] = load[k]
        fits[k, kinds * parts + k] = -1.0
    available = [np.inf if offer.available is None else offer.available for offer in offers]
    most = (np.eye(len(price)), 0, np.concatenate([can.reshape(-1), available]))
    found = milp(
        price,
        constraints=[
            LinearConstraint(each_once, 1, 1),
            LinearConstraint(fits, -np.inf, 0),
            most,
        ],
        integrality=np.ones(len(price)),
    )
    if found.x is None:
        raise ValueError(f"no mix of these offers serves all requests: {found.message}")
    counts = np.rint(found.x[kinds * parts :]).astype(int).tolist()
    return {offer.name: count for offer, count in zip(offers, counts, strict=True)}
