"""Acceptance of one node: worked examples, tables, exact losslessness and its mutants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.speculative.acceptance_formulas import (
    exact_acceptance,
    naive_acceptance,
    sequoia_acceptance,
    specinfer_acceptance,
    top_k_acceptance,
)
from jaxinfer.speculative.expected import expected_tokens
from jaxinfer.speculative.topology import Topology

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = np.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    return scaled / scaled.sum(axis=-1, keepdims=True)


def toy_pair(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Target and draft over 8 tokens, by formula."""
    i = np.arange(8)
    target = 3 * np.cos(1.7 * i + 0.3)
    draft = target + 1.5 * np.sin(2.3 * i + 1.1)
    return softmax(target, temperature), softmax(draft, temperature)


# ---------------------------------------------------------------- worked examples


def test_a_node_worked_out_by_hand():
    exact = exact_acceptance(P, Q, 3)
    np.testing.assert_allclose(exact, [0.7, 0.08 + 0.2 / 7, 1 - 0.78 - 0.2 / 7], atol=1e-15)
    np.testing.assert_allclose(specinfer_acceptance(P, Q, 2), [0.7, 0.06], atol=1e-15)
    np.testing.assert_allclose(top_k_acceptance(P, Q, 2), [0.3, 0.2], atol=1e-15)
    naive = naive_acceptance(P, Q, 2)
    np.testing.assert_allclose(naive.sum(), (P * (1 - (1 - Q) ** 2)).sum(), atol=1e-15)


def test_given_draws_are_accepted_by_the_rule():
    # token 1 is taken with probability .3 / .5; then only token 0 is wanted, offered with .4
    np.testing.assert_allclose(sequoia_acceptance(P, Q, np.array([1, 0])), [0.6, 0.4], atol=1e-15)
    # token 2 is worth nothing after token 1
    np.testing.assert_allclose(
        sequoia_acceptance(P, Q, np.array([1, 2, 0])), [0.6, 0.0, 0.4], atol=1e-15
    )


def test_two_tokens_always_cover_two():
    one_hot, even = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    assert exact_acceptance(one_hot, even, 2).sum() == 1
    assert specinfer_acceptance(one_hot, even, 2).sum() == 0.75
    skewed = np.array([0.6, 0.4])
    assert top_k_acceptance(skewed, skewed, 1).tolist() == [0.6]
    assert exact_acceptance(skewed, skewed, 1).tolist() == [1.0]


def test_after_the_draft_ends_draws_are_uniform_over_the_rest():
    target, draft = np.array([0.0, 0.25, 0.75, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])
    # token 0 is refused; then three tokens are offered with 1/3 each
    first = sequoia_acceptance(target, draft, np.array([0, 2]))
    np.testing.assert_allclose(first, [0, 1])
    np.testing.assert_allclose(exact_acceptance(target, draft, 2), [0, 1 / 4 + 1 / 3], atol=1e-15)


# ---------------------------------------------------------------- the table of the toy pair

TOY = [
    # T, 1 - TV, Sequoia p_1..p_5, Sequoia up to 1..4, SpecInfer up to 1, 2, 4, 8, top-k up to 1..4
    (0.1, 0.657142, (0.657142, 0.000000, 0.337091, 0.005767, 0.000000),
     (0.657142, 0.657142, 0.994233, 1.0), (0.657142, 0.657142, 0.657142, 0.657142),
     (0.657098, 0.657142, 0.999805, 1.0)),
    (0.2, 0.576910, (0.576910, 0.000014, 0.383167, 0.039887, 0.000022),
     (0.576910, 0.576924, 0.960091, 0.999978), (0.576910, 0.576910, 0.576910, 0.576911),
     (0.572245, 0.576909, 0.990148, 1.0)),
    (0.6, 0.519182, (0.519182, 0.017785, 0.392199, 0.060022, 0.010557),
     (0.519182, 0.536967, 0.929166, 0.989187), (0.519182, 0.523786, 0.532861, 0.550496),
     (0.423956, 0.509277, 0.889636, 0.999110)),
    (1.0, 0.560556, (0.560556, 0.063770, 0.300278, 0.048279, 0.022954),
     (0.560556, 0.624326, 0.924604, 0.972883), (0.560556, 0.588010, 0.637670, 0.718147),
     (0.356838, 0.493205, 0.827549, 0.985916)),
    (2.0, 0.711563, (0.711563, 0.103027, 0.116624, 0.040081, 0.015529),
     (0.711563, 0.814590, 0.931214, 0.971294), (0.711563, 0.777828, 0.859929, 0.939221),
     (0.275133, 0.445217, 0.711538, 0.894828)),
]  # fmt: skip


@pytest.mark.parametrize(("temperature", "overlap", "sequoia", "within", "specinfer", "top"), TOY)
def test_the_toy_pair_has_its_exact_acceptance(
    temperature, overlap, sequoia, within, specinfer, top
):
    p, q = toy_pair(temperature)
    exact = exact_acceptance(p, q, 8)
    assert abs(np.minimum(p, q).sum() - overlap) < 1e-6
    np.testing.assert_allclose(exact[:5], sequoia, rtol=0, atol=1e-6)
    np.testing.assert_allclose(exact.cumsum()[:4], within, rtol=0, atol=1e-6)
    others = specinfer_acceptance(p, q, 8).cumsum()[[0, 1, 3, 7]]
    np.testing.assert_allclose(others, specinfer, rtol=0, atol=1e-6)
    np.testing.assert_allclose(top_k_acceptance(p, q, 4).cumsum(), top, rtol=0, atol=1e-6)
    assert abs(exact.sum() - 1) < 1e-12 and abs(top_k_acceptance(p, q, 8).sum() - 1) < 1e-12


@pytest.mark.parametrize(
    ("temperature", "expected", "chain"),
    [(0.2, 3.5411, 2.3632), (0.6, 3.3177, 2.0797), (1.0, 3.2503, 2.2754)],
)
def test_the_toy_pair_has_its_expected_tokens(temperature, expected, chain):
    p = exact_acceptance(*toy_pair(temperature), 8)
    p /= max(p.sum(), 1)  # rounding
    tree = Topology.optimal(p, 16, levels=4, branching=8)
    assert tree.widths == (1, 3, 6, 6)
    assert abs(expected_tokens(tree, p) - expected) <= 0.5001e-4
    assert abs(expected_tokens(Topology.chain(16), p) - chain) <= 0.5001e-4


# ---------------------------------------------------------------- the ensemble

CHILDREN = (1, 2, 4, 8, 16, 32)
ENSEMBLE = {
    (0.2, "sequoia"): (0.3227, 0.4674, 0.6236, 0.7863, 0.9090, 0.9695),
    (0.2, "specinfer"): (0.3200, 0.3470, 0.3706, 0.3927, 0.4149, 0.4383),
    (0.2, "top-k"): (0.3061, 0.4553, 0.6208, 0.7831, 0.9025, 0.9690),
    (0.2, "naive"): (0.3046, 0.3334, 0.3585, 0.3818, 0.4046, 0.4281),
    (0.6, "sequoia"): (0.3601, 0.5059, 0.6381, 0.7764, 0.8883, 0.9540),
    (0.6, "specinfer"): (0.3609, 0.4237, 0.4871, 0.5501, 0.6121, 0.6704),
    (0.6, "top-k"): (0.2623, 0.3947, 0.5495, 0.7109, 0.8427, 0.9377),
    (0.6, "naive"): (0.2368, 0.3030, 0.3689, 0.4347, 0.5004, 0.5647),
    (1.0, "sequoia"): (0.4239, 0.5544, 0.6836, 0.8006, 0.8924, 0.9448),
    (1.0, "specinfer"): (0.4312, 0.5156, 0.6013, 0.6819, 0.7545, 0.8154),
    (1.0, "top-k"): (0.1882, 0.2890, 0.4166, 0.5621, 0.7048, 0.8381),
    (1.0, "naive"): (0.1413, 0.2065, 0.2820, 0.3651, 0.4523, 0.5389),
}


def ensemble(temperature: float) -> dict[str, np.ndarray]:
    """Mean acceptance within the numbers of children, over 2000 random pairs of 256 tokens."""
    rng = np.random.default_rng(0)
    target = 3 * rng.standard_normal((2000, 256))
    draft = target + 2 * rng.standard_normal((2000, 256))
    uniform = rng.random((2000, 256))
    p, q = softmax(target, temperature), softmax(draft, temperature)
    draws = np.argsort(-(np.log(q) - np.log(-np.log(uniform))), axis=-1)[:, :32]
    ranks = {
        "sequoia": sequoia_acceptance(p, q, draws),
        "specinfer": specinfer_acceptance(p, q, 32),
        "top-k": top_k_acceptance(p, q, 32),
        "naive": naive_acceptance(p, q, 32),
    }
    within = [count - 1 for count in CHILDREN]
    return {name: p_k.mean(axis=0).cumsum()[within] for name, p_k in ranks.items()}


@pytest.mark.parametrize("temperature", [0.2, 0.6, 1.0])
def test_methods_compare_as_they_should_over_many_pairs(temperature):
    found = ensemble(temperature)
    for name, within in found.items():
        # equal random numbers: only the fourth digit was rounded
        np.testing.assert_allclose(within, ENSEMBLE[temperature, name], rtol=0, atol=0.6e-4)
    for name in ("specinfer", "top-k", "naive"):
        assert (found["sequoia"][1:] > found[name][1:]).all()


# ---------------------------------------------------------------- lossless, exactly


def output(p, q, children, *, verifier="right", draws="sampled") -> np.ndarray:
    """The distribution of the token a node emits, over all draws and all accepts and rejects.

    Written from the rule, one draw sequence at a time. `verifier` names a mistake in it: "stale
    draft" compares with Q throughout, "stale residual" never takes the refused mass away, and
    "uniform over all" spreads an exhausted draft over drawn tokens too. `draws="top"` takes the
    likeliest tokens of the draft as children instead of drawing them.
    """
    size, emitted = len(p), np.zeros(len(p))
    top = np.argsort(-q, kind="stable")

    def rest(seen: frozenset, everything: bool = False) -> np.ndarray:
        left = np.array([0.0 if token in seen else q[token] for token in range(size)])
        if left.sum() == 0:
            left = np.array([float(everything or token not in seen) for token in range(size)])
        return left / left.sum() if left.sum() else left

    def node(residual: np.ndarray, seen: frozenset, weight: float) -> None:
        if len(seen) == children:
            emitted[:] += weight * residual
            return
        law = rest(seen)
        if draws == "top":
            law = np.eye(size)[top[len(seen)]]
        assumed = rest(seen, everything=verifier == "uniform over all")
        if verifier == "stale draft":
            assumed = q
        left = np.maximum(residual - assumed, 0)
        after = left / left.sum() if left.sum() > 0 else residual
        if verifier == "stale residual":
            after = residual
        for token in np.flatnonzero(law):
            # u * assumed < residual
            wanted, offered = residual[token], assumed[token]
            accept = min(1.0, wanted / offered) if offered > 0 else float(wanted > 0)
            emitted[token] += weight * law[token] * accept
            if accept < 1:
                node(after, seen | {int(token)}, weight * law[token] * (1 - accept))

    node(p, frozenset(), 1.0)
    return emitted


def distance(p: np.ndarray, q: np.ndarray, children: int, **mistake) -> float:
    return 0.5 * float(abs(output(p, q, children, **mistake) - p).sum())


def random_pair(temperature: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = 2 * rng.standard_normal(6)
    return softmax(target, temperature), softmax(target + 1.5 * rng.standard_normal(6), temperature)


def one_hot(token: int) -> np.ndarray:
    return np.eye(6)[token]


HALF = np.array([0.2, 0.5, 0.3, 0.0, 0.0, 0.0])
PAIRS = {
    **{f"T={t}": random_pair(t) for t in (0.01, 0.2, 0.6, 1.0, 2.0)},
    "equal": (random_pair(1.0)[0],) * 2,
    "disjoint": (HALF, HALF[::-1]),
    "one-hot wrong draft": (HALF, one_hot(4)),
    "draft of 2 tokens": (random_pair(1.0)[0], np.array([0.0, 0.7, 0.0, 0.3, 0.0, 0.0])),
    "one-hot target": (one_hot(4), random_pair(1.0)[1]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_emitted_token_has_exactly_the_target_distribution(name):
    for children in (1, 2, 4, 6):
        assert distance(*PAIRS[name], children) < 1e-12


@pytest.mark.parametrize(
    ("mistake", "name", "at_least"),
    [
        ({"verifier": "stale draft"}, "T=1.0", 2e-3),
        ({"verifier": "stale draft"}, "disjoint", 0.1),
        ({"verifier": "stale draft"}, "one-hot wrong draft", 0.1),
        ({"verifier": "stale residual"}, "T=0.6", 0.03),
        ({"verifier": "stale residual"}, "T=2.0", 0.03),
        ({"draws": "top"}, "T=1.0", 0.03),
        ({"verifier": "uniform over all"}, "disjoint", 0.03),
        ({"verifier": "uniform over all"}, "draft of 2 tokens", 0.03),
    ],
)
def test_a_mistake_in_the_verifier_is_seen(mistake, name, at_least):
    assert distance(*PAIRS[name], 4, **mistake) > at_least


def test_the_likeliest_children_must_not_be_verified_as_if_drawn():
    assert abs(distance(*toy_pair(0.6), 1, draws="top") - 0.11) < 0.005
    assert abs(distance(*toy_pair(1.0), 4, draws="top") - 0.31) < 0.005


@pytest.mark.parametrize("name", PAIRS)
def test_the_mean_over_draws_is_the_exact_acceptance(name):
    p, q = PAIRS[name]
    mean = np.zeros(4)

    def draw(tokens: tuple[int, ...], weight: float) -> None:
        if len(tokens) == 4:
            mean[:] += weight * sequoia_acceptance(p, q, np.array(tokens))
            return
        left = np.array([0.0 if token in tokens else q[token] for token in range(6)])
        if left.sum() == 0:
            left = np.array([float(token not in tokens) for token in range(6)])
        for token in np.flatnonzero(left):
            draw((*tokens, int(token)), weight * left[token] / left.sum())

    draw((), 1.0)
    np.testing.assert_allclose(mean, exact_acceptance(p, q, 4), rtol=0, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from([0.05, 0.5, 1.0, 3.0]))
@settings(deadline=None, max_examples=40)
def test_acceptance_keeps_its_invariants(seed, size, temperature):
    rng = np.random.default_rng(seed)
    p, q = softmax(rng.standard_normal((2, size)), temperature)
    exact = exact_acceptance(p, q, size)
    assert abs(exact[0] - np.minimum(p, q).sum()) < 1e-12  # one child: the optimal transport
    assert abs(exact.sum() - 1) < 1e-9  # all tokens drawn: one of them fits
    assert (exact >= 0).all()
    assert (exact.cumsum() >= specinfer_acceptance(p, q, size).cumsum() - 1e-12).all()
    same = exact_acceptance(q, q, size)
    np.testing.assert_allclose(same, np.eye(size)[0], atol=1e-12)
    draws = np.argsort(rng.random((5, size)), axis=-1)
    rows = sequoia_acceptance(np.tile(p, (5, 1)), np.tile(q, (5, 1)), draws)
    for row, order in zip(rows, draws, strict=True):  # a batch is row by row
        np.testing.assert_array_equal(row, sequoia_acceptance(p, q, order))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_acceptance(P, Q, 4), "children is 4, expected 1 to 3"),
        (lambda: exact_acceptance(P, Q, 0), "children is 0"),
        (lambda: exact_acceptance(np.ones(64) / 64, np.ones(64) / 64, 9), "histories"),
        (lambda: exact_acceptance(P * 2, Q, 2), "p must hold distributions"),
        (lambda: naive_acceptance(P, Q * [1, -1, 1], 2), "q must hold distributions"),
        (lambda: top_k_acceptance(P, Q * np.nan, 2), "q must hold distributions"),
        (lambda: specinfer_acceptance(P, Q, 0), "children is 0, expected 1 or more"),
        (lambda: sequoia_acceptance(P, Q, np.array([1, 1])), "drawn twice"),
        (lambda: sequoia_acceptance(P, Q, np.array([3])), "outside the vocabulary of 3"),
    ],
)
def test_what_is_no_distribution_or_no_draw_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
