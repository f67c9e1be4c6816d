"""The cheapest mix against the published example and against all mixes."""

import itertools

import numpy as np
import pytest

from jaxinfer.parallel.hexgen.budget import GpuOffer, cheapest_mix


def test_the_published_example_costs_6_70_dollars():
    """hexgen.md 0.5: 30 requests/s in four classes of sizes."""
    offers = (
        GpuOffer(name="A10G", price_per_hour=1.01, requests_per_s=(2.0, 1.0, 5.0, 2.0)),
        GpuOffer(name="A100-80GB", price_per_hour=3.67, requests_per_s=(20.0, 20.0, 40.0, 20.0)),
    )
    found = cheapest_mix(offers, (6.0, 3.0, 15.0, 6.0), slices=1)
    assert found == {"A10G": 3, "A100-80GB": 1}
    price = sum(found[offer.name] * offer.price_per_hour for offer in offers)
    assert price == pytest.approx(6.70)


def test_no_assignment_of_whole_classes_is_cheaper():
    random = np.random.default_rng(0)
    for _ in range(20):
        rates = random.uniform(0.5, 5.0, 4)
        served, prices = random.uniform(0.5, 6.0, (2, 4)), random.uniform(1.0, 4.0, 2)
        offers = [
            GpuOffer(name=f"g{k}", price_per_hour=prices[k], requests_per_s=tuple(served[k]))
            for k in range(2)
        ]
        found = cheapest_mix(offers, rates.tolist(), slices=1)
        ours = sum(found[f"g{k}"] * prices[k] for k in range(2))
        costs = []
        for taken in itertools.product((0, 1), repeat=4):
            load = [sum(rates[c] / served[k, c] for c in range(4) if taken[c] == k) for k in (0, 1)]
            costs.append(float(np.dot(np.ceil(np.array(load) - 1e-9), prices)))
        assert ours == pytest.approx(min(costs))


def test_what_no_offer_serves_is_refused():
    slow = GpuOffer(name="slow", price_per_hour=1.0, requests_per_s=(1.0, 0.0))
    assert cheapest_mix([slow], [2.5, 0.0]) == {"slow": 3}
    with pytest.raises(ValueError, match="no mix of these offers"):
        cheapest_mix([slow], [1.0, 1.0])
    few = GpuOffer(name="few", price_per_hour=1.0, requests_per_s=(1.0,), available=2)
    with pytest.raises(ValueError, match="no mix of these offers"):
        cheapest_mix([few], [2.5])
    with pytest.raises(ValueError, match="every offer needs 2 rates"):
        cheapest_mix([few], [1.0, 1.0])
    with pytest.raises(ValueError, match="requests_per_s"):
        cheapest_mix([few], [float("nan")])
