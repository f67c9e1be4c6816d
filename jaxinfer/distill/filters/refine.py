"""Gradient descent on the modes of all filters at once, by Optax.

Filters do not interact: the loss is a sum over them and Adam's steps are per number, so a group of
filters is one program. `relative` descent fits the error of each filter relative to its own energy
and keeps the best iterate of each. The recipe of the authors (their notebook; arXiv 2310.18780,
section 3) starts on a ring, minimises the absolute mean squared error and keeps the last iterate.

Poles are stable by construction, r = exp(-exp(nu)), and nu is held above the decay that samples can
tell, where float32 keeps poles inside the unit circle.

Axis letters: F filters, K modes, N samples.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxinfer.distill.filters.realize import slowest
from jaxinfer.nn.modal import ModalFilter, impulse_response
from jaxinfer.progress import Report, silent
from jaxinfer.typing import Params

MEMORY = 2**28  # bytes of a group
BYTES = 64  # of a sample in descent: the response, its error, and their gradients
ROUND = 500  # steps between reports


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Adam with a cosine rate from `peak` to 1e-6."""

    steps: int = 5000
    peak: float = 1e-3
    relative: bool = True  # to each filter's energy, the best iterate kept; else absolute, the last

    def transform(self) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(self.peak, self.steps, alpha=1e-6 / self.peak)
        return optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=0.0)


PAPER = Recipe(steps=30_000, peak=6e-4, relative=False)


class _State(NamedTuple):
    params: Params
    opt_state: optax.OptState
    best: Params
    least: Array  # [F], the loss of `best`


def refine(
    start: ModalFilter,
    target: Float[np.ndarray, "F N"],
    recipe: Recipe = Recipe(),
    report: Report = silent,
) -> ModalFilter:
    """The filters after descent towards `target`, their samples behind lag 0.

    Relative descent sees every filter scaled to norm one, so that its rate means the same for all.
    """
    norm = np.linalg.norm(target, axis=1, keepdims=True)
    scale = np.where(norm > 0, norm, 1) if recipe.relative else np.ones_like(norm)
    start = replace(start, a=start.a / scale, b=start.b / scale)
    found = _refine(start, target / scale, recipe, report)
    return replace(found, a=found.a * scale, b=found.b * scale)


def _refine(start: ModalFilter, target: np.ndarray, recipe: Recipe, report: Report) -> ModalFilter:
    """In groups of equal size, so that they share a program and memory is bounded."""
    filters = len(target)
    groups = -(-filters * BYTES * target.shape[1] // MEMORY)
    size = -(-filters // groups)
    found = []
    for group in range(groups):
        rows = np.minimum(np.arange(group * size, (group + 1) * size), filters - 1)

        def done(step: int, before: int = group * recipe.steps) -> None:
            report("refining", before + step, groups * recipe.steps)

        part = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(np.asarray(leaf)[rows]), start)
        found.append(_descend(part, jnp.asarray(target[rows], jnp.float32), recipe, done))
    return jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)[:filters]), *found)


def _descend(start: ModalFilter, target: Array, recipe: Recipe, done) -> ModalFilter:
    params = {name: getattr(start, name) for name in ("nu", "theta", "a", "b")}
    best = jax.tree.map(jnp.copy, params)
    state = _State(params, recipe.transform().init(params), best, jnp.full(len(target), jnp.inf))
    for step in range(0, recipe.steps, ROUND):
        count = min(ROUND, recipe.steps - step)
        state = jax.block_until_ready(_advance(state, target, start.h0, recipe, count))
        done(step + count)
    return replace(start, **(state.best if recipe.relative else state.params))


@functools.partial(jax.jit, static_argnames=("recipe", "count"), donate_argnums=0)
def _advance(state: _State, target: Array, h0: Array, recipe: Recipe, count: int) -> _State:
    samples = target.shape[1]
    transform = recipe.transform()
    floor = np.float32(np.log(slowest(samples)))
    scale = 1 if recipe.relative else target.size

    def loss(params: Params) -> tuple[Array, Array]:
        response = impulse_response(ModalFilter(**params, h0=h0), samples + 1)[:, 1:]
        each = jnp.square(response - target).sum(axis=1) / scale
        return each.sum(), each

    def step(_, state: _State) -> _State:
        (_, each), slope = jax.value_and_grad(loss, has_aux=True)(state.params)
        better = each < state.least
        best = jax.tree.map(
            lambda new, old: jnp.where(better[:, None], new, old), state.params, state.best
        )
        updates, opt_state = transform.update(slope, state.opt_state, state.params)
        moved: Any = optax.apply_updates(state.params, updates)
        moved["nu"] = jnp.maximum(moved["nu"], floor)
        return _State(moved, opt_state, best, jnp.where(better, each, state.least))

    return jax.lax.fori_loop(0, count, step, state)
