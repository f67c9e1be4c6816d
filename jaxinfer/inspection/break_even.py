"""Below which density a model's sparse blocks are faster than in full, measured on the machine.

`SparseMlp.pays_below` chooses by constants, as a program must not depend on a measurement; this
says how good they are here, for blocks of the model's own shape. On an idle machine it is where
the constants come from; beside other work it says more than them, as a list needs one core only.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.inspection.roofline import rescaled, timings
from jaxinfer.nn.block_mlp import Listed, block_mlp
from jaxinfer.runtime.backend import Backend
from jaxinfer.runtime.program import Program
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Params

MOST_BLOCKS = 4  # of the model, so that a step passes over more weights than a core's cache holds
SHARES = 0.125, 0.5  # at which lists are timed; between and beyond a straight line is drawn
ROUNDS, ROUND_S = 5, 0.03


def break_even(
    cfg: ModelConfig, params: Params, rows: int = 1, backend: Backend | None = None
) -> float | None:
    """The share of the blocks of neurons at which `rows` tokens that read a list of them take as
    long as with all of them, from 0 to 1; None where no layer is sparse.

    It takes a second or two. Routers, which either form runs, are not in it.
    """
    found = [x["mlp"] for x in params["layers"] if isinstance(x["mlp"], SparseMlp)]
    if not found:
        return None
    first = found[0]
    alike = [x for x in found if jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, first)]
    blocks, backend = tuple(alike[:MOST_BLOCKS]), backend or Backend.of()
    units = first.selector.units
    x = jnp.ones((rows, cfg.hidden_size), params["embed"]["tokens"].dtype)
    program = Program(_steps, static_argnames=("cfg", "backend"))

    def seconds(live: int | None, steps: int) -> float:
        count = None if live is None else jnp.int32(live)
        run = lambda: program(cfg, blocks, x, count, jnp.int32(steps), backend)  # noqa: E731
        return timings(run, repeats=1)[0] / steps

    lives = [max(round(share * units), 1) for share in SHARES]
    if lives[0] == lives[1]:  # a single block: there is no list to speak of
        return 0.0
    steps = max(1, round(ROUND_S / max(seconds(None, 1), 1e-6)))
    rounds = [[seconds(live, steps) for live in (*lives, None)] for _ in range(ROUNDS)]
    shares = [live / units for live in lives]
    return statistics.median(  # of rounds, as a busy machine slows all of a round alike
        crossing((shares[0], few), (shares[1], many), whole) for few, many, whole in rounds
    )


def crossing(few: tuple[float, float], many: tuple[float, float], whole: float) -> float:
    """Where the line through two points (share, seconds) reaches `whole`, kept within 0 and 1."""
    slope = (many[1] - few[1]) / (many[0] - few[0])
    if slope <= 0:  # more blocks cost nothing, in the noise of the measurement
        return 1.0 if few[1] <= whole else 0.0
    return min(max(few[0] + (whole - few[1]) / slope, 0.0), 1.0)


def _steps(
    cfg: ModelConfig,
    blocks: tuple[SparseMlp, ...],
    x: Float[Array, "R D"],
    live: Int[Array, ""] | None,
    steps: Int[Array, ""],
    backend: Backend,
) -> Float[Array, "R D"]:
    """`steps` times all blocks, each feeding the next; `live` of each in turn, None for all."""
    units = blocks[0].selector.units
    every = jnp.ones((len(x), units), bool)
    places, order = jnp.arange(units), np.random.default_rng(0).permutation(units)

    def step(index: Array, x: Array) -> Array:
        selection = every
        if live is not None:  # others than the step before, as a cache would hold those
            listed = jnp.asarray(order, jnp.int32)[(places + index * live) % units]
            selection = Listed(listed, live, None if len(x) == 1 else every)
        for block in blocks:
            y = block_mlp(
                block.weights, x, selection, block_size=block.block_size,
                activation=cfg.activation, backend=backend,
            )  # fmt: skip
            x = rescaled(x + y.astype(x.dtype))
        return x

    return jax.lax.fori_loop(0, steps, step, x)
