"""The time of one call on the device, and the rate at which it moves the bytes that it must.

A timed program calls a kernel on several sets of inputs in turn, many times over, in one compiled
loop: launches cost nothing that way, and as the sets together are larger than twice the L2 cache
none is found there. Each call waits for the one before through a barrier on its inputs, so that
nothing is hoisted, merged or left out (a test reads this from the program for an H200).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu.rows import Run, copy_bandwidth
from bench.harness import summarise
from jaxinfer.cache.base import bytes_of
from jaxinfer.inspection.roofline import timings

ROTATED = 128e6  # bytes: more than twice the 50 MB of an H100's L2 cache, or the 60 MB of an H200's
MOST_SETS = 32
TARGET_S = 0.02  # of one loop
GUESS = 2e12  # bytes per second, to choose the number of rounds
CALL_S = 5e-6  # the least that a launch takes


def filled(seed: Any, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Hashes of the indices: uint32 as they are, floats uniform in [-scale, scale].

    Made where they are stored, without anything on the way; never zeros, on which kernels run
    faster than on data.
    """
    x = jnp.uint32(seed) * jnp.uint32(0x85EBCA6B) + jnp.uint32(0x9E3779B9)
    for axis in range(len(shape)):
        x = (x ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        x = x ^ (x >> 15)
    if dtype == jnp.uint32:
        return x
    unit = (x >> 8).astype(jnp.float32) * jnp.float32(2**-23) - 1
    return (unit * scale).astype(dtype)


@dataclass(kw_only=True)
class Timed:
    """A step that times `call(state, *given) -> (state, out)`.

    `inputs(seed)` makes (state, given) and is traced. `bytes` is what the call must move, `slow`
    how many times longer than those bytes it may well take.
    """

    config: dict[str, Any]
    suite: Run
    inputs: Callable[[Any], tuple[Any, tuple]]
    call: Callable[..., tuple[Any, Any]]
    bytes: float
    slow: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    fill: Any = None
    compiled: Any = None

    def prepare(self) -> dict[str, Any] | None:
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        state, given = jax.eval_shape(self.inputs, seed)
        held = bytes_of((state, given))
        self.sets = min(max(math.ceil(ROTATED / max(self.bytes, 1)), 1), MOST_SETS)
        each = max(self.bytes / GUESS, CALL_S) * self.slow
        self.rounds = min(max(round(TARGET_S / each / self.sets), 1), 1000)
        if self.suite.interpret or self.suite.quick:
            self.sets, self.rounds = 2, 1
        room = memory_limit()
        if room is not None and self.sets * held > 0.9 * room:
            return {"skipped": f"inputs of {self.sets * held / 1e9:.0f} GB do not fit"}
        self.fill = jax.jit(self.inputs).lower(seed).compile()
        loop = functools.partial(chain, jax.jit(self.call), rounds=self.rounds)
        given = (given,) * self.sets
        states = (state,) * self.sets
        self.compiled = jax.jit(loop, donate_argnums=0).lower(states, given).compile()
        temp = self.compiled.memory_analysis().temp_size_in_bytes
        if room is not None and self.sets * held + temp > 0.95 * room:
            sizes = f"{temp / 1e9:.0f} GB beside {self.sets * held / 1e9:.0f} GB of inputs"
            return {"skipped": f"{sizes} do not fit"}
        return None

    def run(self) -> dict[str, Any]:
        sets = [self.fill(jnp.uint32(self.suite.seed + i)) for i in range(self.sets)]
        states, given = tuple(state for state, _ in sets), tuple(given for _, given in sets)
        del sets

        def once() -> Any:
            nonlocal states
            states, last = self.compiled(states, given)
            return last

        seconds = timings(once, repeats=7, budget_s=0.4)
        each = summarise([1e6 * s / self.rounds / self.sets for s in seconds])
        rate = self.bytes / each["median"] * 1e6
        copy = copy_bandwidth(self.suite.out)
        return self.extra | {
            "us": each["median"],
            "times_us": each,
            "bytes": self.bytes,
            "gb_per_s": rate / 1e9,
            "share_of_copy": rate / copy if copy else None,
            "sets": self.sets,
            "rotated_mb": self.sets * self.bytes / 1e6,
            "calls": self.sets * self.rounds,
        }

    def drop(self) -> None:
        self.compiled = self.fill = None


def chain(call: Callable[..., Any], states: tuple, given: tuple, *, rounds: int) -> tuple[Any, Any]:
    """All sets in turn, `rounds` times; returns the states and outputs of the last round."""
    shape = jax.eval_shape(call, states[0], *given[0])[1]
    last = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

    def body(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        states, (*_, last) = carry
        states, outs = list(states), []
        for i, one in enumerate(given):
            # What comes out of the barrier is kept: XLA drops what a barrier gives to nobody, and
            # with it the call that it waits for.
            now, before = jax.lax.optimization_barrier((one, last))
            states[i], last = call(states[i], *now)
            outs.append(before)
        return tuple(states), (*outs, last)

    return jax.lax.fori_loop(0, rounds, body, (states, (last,) * (len(given) + 1)))


def memory_limit() -> int | None:
    """Bytes that this process may have on the device."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
