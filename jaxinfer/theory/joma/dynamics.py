"""`solve`: how MLP weights and attention of one block move together (arXiv 2310.00535)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import flag, one_of, real, whole
from jaxinfer.theory.joma.fields import ATTENTIONS, TIMES, Attention, Drive, Field, State, Time
from jaxinfer.theory.joma.integrate import SOLVERS, Solver, adaptive, fixed
from jaxinfer.theory.joma.vectors import Numbers, finite_array
from jaxinfer.theory.measures.attention import entropy

BLOWN_UP = 6.0
"""A |v| at which exp attention is within 2e-9 of its blow-up time (relative)."""


@dataclass(frozen=True)
class Trajectory:
    """A solution at S times, NumPy float64; `v` has the shape that `delta` or `mu` had.

    `stopped`: whether it ends before the last time that was asked for, as some |v| reached the
    limit.
    """

    time: np.ndarray  # [S], or [S, K] where each node has its own attention and softmax time
    softmax_time: np.ndarray  # likewise; equal to `time` for linear and softmax attention
    v: np.ndarray  # [S, M] or [S, M, K]
    z: np.ndarray  # [S, M], the logits, or [S, M, K] where each node has its own
    attention: np.ndarray  # as `z`: b, normalised to sum 1 over tokens that occur equally often
    stopped: bool

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of `attention` over tokens, in nats, [S] or [S, K]."""
        return entropy(np.moveaxis(self.attention, 1, -1))


def solve(
    field: Attention = "exp",
    *,
    delta: Numbers | None = None,
    mu: Numbers | None = None,
    start: Numbers = 0.0,
    logits: Numbers | None = None,
    until: float | None = None,
    points: int = 101,
    times: Numbers | None = None,
    joint: bool = False,
    shared: bool = True,
    time: Time = "raw",
    scale: float = 1.0,
    temperature: float = 1.0,
    solver: Solver = "tsit5",
    rtol: float = 1e-9,
    atol: float = 1e-11,
    substeps: int = 20,
    stop_at: float | None = None,
) -> Trajectory:
    """The gradient flow of MLP weights and attention logits, in float64.

    Args:
        field: how logits become attention: "linear", "exp" or "softmax".
        delta: saliency of each token, [M], or [M, K] for K nodes: identity activation.
        mu: where the weights go, [M] or [M, K]: nonlinear activation. Give one of the two.
        start: `v` at time 0, of that shape or one number.
        logits: `z` at time 0, [M] or one number; 0, and 1 for linear attention, where 0 stays 0.
        until: the last time; `points` times from 0 on are then returned.
        times: the times themselves instead, rising from 0.
        joint: integrate the logits too, instead of taking them from the conserved quantity.
        shared: whether K nodes share one attention vector; else each column is its own problem.
        time: "softmax" integrates exp attention in the time in which nothing blows up.
        scale: A in b = exp(z / T) / A.
        temperature: T.
        solver: "tsit5"; "kvaerno5" for stiff fields (large `mu`); "rk4" needs no diffrax.
        rtol: relative error per step of the first two.
        atol: absolute error per step.
        substeps: steps of "rk4" between two times.
        stop_at: end where some |v| reaches this. By default 6 where v blows up in finite time
            (exp attention, `delta`, raw time), and no limit elsewhere.

    Raises:
        ValueError: for arguments that do not fit, for a missing diffrax, and for too many steps.

    Example:
      >>> run = solve("exp", mu=[0.5, 1.0, 1.5, 2.0, 2.5], until=9.0, solver="rk4")
      >>> [round(float(x), 2) for x in (run.entropy[0], run.entropy.min(), run.entropy[-1])]
      [1.61, 0.91, 1.08]
    """
    rule = Field(
        one_of("field", field, ATTENTIONS), flag("joint", joint), flag("shared", shared),
        one_of("time", time, TIMES),
    )  # fmt: skip
    solver = one_of("solver", solver, SOLVERS)
    if rule.time == "softmax" and rule.attention != "exp":
        raise ValueError(f"time='softmax' is for field='exp', got field={field!r}")
    push, shape, driven = _push(delta, mu)
    at = _times(until, points, times)
    scale = real("scale", scale, 1e-300, 1e300)
    temperature = real("temperature", temperature, 1e-300, 1e300)
    v = _of_shape("start", start, push.shape, shape)
    z = _first_logits(rule, logits, push.shape)
    explosive = rule.attention == "exp" and rule.time == "raw" and driven == "delta"
    limit = (BLOWN_UP if explosive else math.inf) if stop_at is None else real("stop_at", stop_at)
    if np.abs(v).max() >= limit:
        raise ValueError(f"stop_at must be above |start|, got {limit:g} at {np.abs(v).max():g}")
    rtol, atol = real("rtol", rtol, 1e-14, 1e-1), real("atol", atol, 0.0, 1e-1)
    substeps = whole("substeps", substeps, 1, 100_000)
    with jax.enable_x64(True):
        square = np.square(v).sum(axis=1, keepdims=True) if rule.shared else np.square(v)
        linear = rule.attention == "linear"
        offset = np.square(z) - square if linear else z - square / (2 * temperature)
        arrays = {driven: jnp.asarray(push), "mu" if driven == "delta" else "delta": None}
        drive = Drive(
            **arrays, offset=jnp.asarray(offset), scale=jnp.asarray(scale),
            temperature=jnp.asarray(temperature), limit=jnp.asarray(limit),
        )  # fmt: skip
        last = at[-1]
        first = State(jnp.asarray(v), jnp.asarray(z) if joint else None, jnp.zeros(z.shape[1]))
        if solver == "rk4":
            at, states = fixed(rule, first, drive, at, substeps)
        else:
            at, states = adaptive(rule, first, drive, at, solver, rtol, atol)
        return _trajectory(rule, drive, at, states, shape, bool(at[-1] < last))


def _trajectory(
    rule: Field, drive: Drive, at: np.ndarray, states: State, shape: tuple[int, ...], stopped: bool
) -> Trajectory:
    both = jax.vmap(lambda state: (z := rule.logits(state, drive), rule.gain(z, drive)))
    z, b = (np.asarray(x) for x in both(states))
    b = np.abs(b) / np.abs(b).sum(axis=1, keepdims=True)
    own = np.broadcast_to(at[:, None], states.clock.shape)
    one = rule.shared or len(shape) == 1
    clocks = [np.asarray(x[:, 0] if one else x) for x in (own, states.clock)]
    raw, softmax = clocks if rule.time == "raw" else clocks[::-1]
    return Trajectory(
        raw, softmax, states.v.reshape(len(at), *shape), z[..., 0] if one else z,
        b[..., 0] if one else b, stopped,
    )  # fmt: skip


def _push(delta: Numbers | None, mu: Numbers | None) -> tuple[np.ndarray, tuple, str]:
    if (delta is None) == (mu is None):
        raise ValueError(
            "give delta (saliency, identity activation) or mu (targets, nonlinear activation), "
            f"got {'neither' if delta is None else 'both'}"
        )
    name, given = ("mu", mu) if delta is None else ("delta", delta)
    push = finite_array(name, given)
    if push.ndim not in (1, 2) or not push.size:
        raise ValueError(f"{name} must be [M] or [M, K], got the shape {list(push.shape)}")
    return push.reshape(len(push), -1), push.shape, name


def _times(until: float | None, points: int, times: Numbers | None) -> np.ndarray:
    if (until is None) == (times is None):
        raise ValueError("give until, the last time, or times, all of them")
    if times is None:
        assert until is not None
        return np.linspace(
            0.0, real("until", until, 1e-12, 1e12), whole("points", points, 2, 10**6)
        )
    at = finite_array("times", times)
    if at.ndim != 1 or len(at) < 2 or at[0] != 0 or not (np.diff(at) > 0).all():
        raise ValueError("times must rise from 0, two of them at least")
    return at


def _of_shape(
    name: str, given: Numbers, full: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
    array = finite_array(name, given)
    if array.shape not in ((), shape):
        raise ValueError(
            f"{name} must be one number or of shape {list(shape)}, got {list(array.shape)}"
        )
    return np.broadcast_to(array.reshape(full if array.ndim else ()), full).copy()


def _first_logits(rule: Field, logits: Numbers | None, full: tuple[int, ...]) -> np.ndarray:
    if logits is None:
        logits = 1.0 if rule.attention == "linear" else 0.0
    wanted = (full[0],) if rule.shared or full[1] == 1 else full
    z = _of_shape("logits", logits, (full[0], 1) if rule.shared else full, wanted)
    if rule.attention == "linear" and not (z > 0).all():
        raise ValueError("logits must be above 0 with linear attention, where 0 stays 0")
    return z
