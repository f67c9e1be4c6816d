"""Which text to calibrate or train on: the one whose tokens look to the model most like those of
the text that it will read.

Compared are the inputs of a feed-forward block in the middle of the model, which is what predictors
and routers see, by the debiased R_rho with its permutation test (specification r_rho_transport.md,
sections 8 and 9.2; ours). The raw value would mostly say that two samples are two samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jaxinfer.arguments import whole
from jaxinfer.models.walk import HasParameters, walk
from jaxinfer.theory.transport.divergence import PERMUTATIONS, debiased

POINTS, DIMENSIONS = 256, 16


@dataclass(frozen=True)
class Nearness:
    """How far a text is from the deployment text."""

    name: str
    value: float
    """Debiased R_rho over the spread of the deployment text: about 0 for texts of one kind."""
    p_value: float
    """How often reshuffled tokens of both texts are as far apart: small where the texts differ, and
    on the small side always, as tokens of one window are not independent."""


def nearest_texts(
    model: HasParameters,
    deployment: Int[np.ndarray, "Q T"],
    texts: Mapping[str, Int[np.ndarray, "_ T"]],
    *,
    layer: int | None = None,
    points: int = POINTS,
    rho: float = 1.25,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Nearness]:
    """The texts by their distance to the deployment text, the nearest first.

    Args:
      model: the model that is to be calibrated.
      deployment: windows of the text that it will read, as tokens.
      texts: by name, windows of the texts to choose from, as long.
      layer: whose feed-forward block's inputs are compared; None: the one in the middle.
      points: tokens of each text that are compared, 8 at least.
      rho: above 1; 1.25 is quicker than 1.1 for clouds with clusters.
      permutations: of the test; 200 at least for a p-value of 0.005.
      seed: of what is drawn.

    Raises:
      ValueError: there are no texts, or a text has fewer tokens than `points`.
    """
    points = whole("points", points, 8)
    middle = model.config.num_layers // 2
    most = model.config.num_layers - 1
    layer = middle if layer is None else whole("layer", layer, 0, most)
    if not texts:
        raise ValueError("there are no texts to choose from; give some")
    samples = {}
    for name, tokens in {"": deployment, **texts}.items():
        rows = _inputs(model, tokens, layer)
        if len(rows) < points:
            what = f"text {name!r}" if name else "the deployment text"
            raise ValueError(
                f"{what} has {len(rows)} tokens in the second halves of its windows, fewer than "
                f"the {points} to compare; give a longer one, or compare fewer"
            )
        rng = np.random.default_rng(seed)
        samples[name] = rows[rng.permutation(len(rows))[:points]]
    pool = np.concatenate(list(samples.values()))
    centre = pool.mean(axis=0)
    _, _, axes = np.linalg.svd(pool - centre, full_matrices=False)
    reduced = {
        name: ((x - centre) @ axes[:DIMENSIONS].T).astype(np.float32) for name, x in samples.items()
    }
    own = reduced.pop("")
    spread = float(np.sqrt(np.square(own - own.mean(axis=0)).sum(axis=1).mean())) or 1.0
    found = []
    for name, sample in reduced.items():
        test = debiased(own, sample, rho, permutations=permutations, seed=seed)
        found.append(Nearness(name, test.value / spread, test.p_value))
    return sorted(found, key=lambda one: one.value)


def _inputs(
    model: HasParameters, tokens: Int[np.ndarray, "Q T"], layer: int
) -> Float[np.ndarray, "R D"]:
    """Those of each window's second half: equal beginnings would be equal points, on which the
    solver stalls."""
    for view in walk(model, tokens):
        if view.index == layer:
            late = view.mlp_input[:, tokens.shape[1] // 2 :]
            return late.reshape(-1, late.shape[2])
    raise AssertionError
