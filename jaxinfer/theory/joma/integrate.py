"""Integration of a flow to given times: diffrax's adaptive solvers, and classical Runge-Kutta.

Call it where float64 is enabled. Programs are compiled once per field and number of times.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer.theory.extra import needed
from jaxinfer.theory.joma.fields import Drive, Field, State

Solver = Literal["tsit5", "kvaerno5", "rk4"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)

MOST_STEPS = 200_000
"""Steps of an adaptive solver; a stiff field that takes Tsit5 longer is one for Kvaerno5."""


def adaptive(
    field: Field, start: State, drive: Drive, times: np.ndarray, solver: Solver, rtol: float,
    atol: float,
) -> tuple[np.ndarray, State]:  # fmt: skip
    """The states at `times`, up to the moment at which some |v| reaches the limit, which is then
    the last.

    Raises:
        ValueError: if diffrax is missing, fails, or needs more than `MOST_STEPS` steps.
    """
    diffrax = needed("diffrax", f"solver={solver!r}")
    optimistix = needed("optimistix", f"solver={solver!r}")
    event = None
    if np.isfinite(drive.limit):
        # near a blow-up |v| moves by 1e-8 from one float64 time to the next
        event = diffrax.Event(_distance, optimistix.Newton(1e-7, 1e-7, optimistix.rms_norm))
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        {"tsit5": diffrax.Tsit5, "kvaerno5": diffrax.Kvaerno5}[solver](),
        t0=times[0], t1=times[-1], dt0=None, y0=start, args=drive,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times), t1=True),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        event=event, max_steps=MOST_STEPS, throw=False,
    )  # fmt: skip
    if found.result == diffrax.RESULTS.max_steps_reached:
        other = "a shorter time" if solver == "kvaerno5" else "solver='kvaerno5'"
        raise ValueError(
            f"{solver} needs more than {MOST_STEPS} steps to time {times[-1]:g}; try {other}"
        )
    ended = (diffrax.RESULTS.successful, diffrax.RESULTS.event_occurred)
    if all(found.result != one for one in ended):
        raise ValueError(f"{solver} failed before time {times[-1]:g}; try a shorter time")
    ts = np.asarray(found.ts)
    # What was not reached is infinite; the end is there twice if it was asked for.
    keep = np.isfinite(ts)
    keep[1:] &= np.diff(np.where(keep, ts, 0)) != 0
    return ts[keep], jax.tree.map(lambda x: np.asarray(x)[keep], found.ys)


def fixed(
    field: Field, start: State, drive: Drive, times: np.ndarray, substeps: int
) -> tuple[np.ndarray, State]:
    """The same by the classical fourth-order rule, `substeps` steps between two times; the end is
    the first of the times at which some |v| has reached the limit."""
    later = _runge_kutta(field, jnp.asarray(substeps), start, drive, jnp.diff(times))
    states = jax.tree.map(lambda a, b: np.concatenate([np.asarray(a)[None], b]), start, later)
    high = np.abs(states.v).max(axis=(1, 2))
    over = ~(high < float(drive.limit))  # so is what has become infinite or no number
    end = int(np.argmax(over)) + 1 if over.any() else len(times)
    end -= not np.isfinite(high[end - 1])
    return times[:end], jax.tree.map(lambda x: x[:end], states)


def _distance(t: Array, y: State, args: Drive, **_: object) -> Array:
    return jnp.abs(y.v).max() - args.limit


@partial(jax.jit, static_argnums=0)
def _runge_kutta(field: Field, substeps: Array, start: State, drive: Drive, gaps: Array) -> State:
    def step(state: State, size: Array) -> State:
        def moved(slope: State, share: float) -> State:
            return jax.tree.map(lambda y, k: y + share * size * k, state, slope)

        first = field(size, state, drive)
        second = field(size, moved(first, 0.5), drive)
        third = field(size, moved(second, 0.5), drive)
        fourth = field(size, moved(third, 1.0), drive)
        return jax.tree.map(
            lambda y, a, b, c, d: y + size / 6 * (a + 2 * b + 2 * c + d),
            state, first, second, third, fourth,
        )  # fmt: skip

    def between(state: State, gap: Array) -> tuple[State, State]:
        state = jax.lax.fori_loop(0, substeps, lambda _, one: step(one, gap / substeps), state)
        return state, state

    return jax.lax.scan(between, start, gaps)[1]
