"""The smallest recurrent mixer, as a test of the protocol: a gated running mean.

    s_t = a * s_(t-1) + (1 - a) * u_t;   y_t = out(s_t * gate_t)

with u and gate linear in the layer's input and a per channel. Its state is s of the last committed
token; what a call adds are the states behind its nodes, of which `commit` takes the last accepted.
"""

import jax
import jax.numpy as jnp

from jaxinfer.models.mixer import Mixer
from jaxinfer.models.shapes import abstract_linear
from jaxinfer.nn.linear import linear


class RunningMean(Mixer):
    def abstract_params(self, cfg, layer, dtype):
        d = cfg.hidden_size
        names = ("u", "gate", "out")
        params = {name: abstract_linear(d, d, False, dtype) for name in names}
        return params | {"decay": {"bias": jax.ShapeDtypeStruct((d,), dtype)}}

    def init(self, cfg, policy, geometry, batch):
        return jnp.zeros((batch, cfg.hidden_size), geometry.dtype)

    def read(self, cfg, policy, params, state, x, ctx, prepared, layer):
        keep = jax.nn.sigmoid(1 + params["decay"]["bias"])
        new = (1 - keep) * linear(params["u"], x)
        if isinstance(state, tuple):  # no cache
            state = jnp.zeros_like(new[:, 0])
        if ctx.parent is None:
            states = _chain(keep, state, new)
            fresh = states
        else:
            fresh = _tree(keep, state, new, ctx)
            states = fresh[:, -new.shape[1] :]
        return linear(params["out"], states * linear(params["gate"], x)), fresh

    def commit(self, cfg, policy, params, state, fresh, ctx):
        last = jnp.maximum(ctx.count - 1, 0)[:, None]
        if ctx.accepted is not None:
            last = jnp.take_along_axis(ctx.accepted, last, axis=1)
        new = jnp.take_along_axis(fresh, last[..., None], axis=1)[:, 0]
        return jnp.where((ctx.count > 0)[:, None], new, state).astype(state.dtype)

    def bytes_per_row(self, cfg, policy, geometry):
        return cfg.hidden_size * jnp.dtype(geometry.dtype).itemsize


def _chain(keep, state, new):
    def step(state, u):
        state = keep * state + u
        return state, state

    return jax.lax.scan(step, state, new.swapaxes(0, 1))[1].swapaxes(0, 1)


def _tree(keep, state, new, ctx):
    """The states of the pending tokens and then of the nodes, a level at a time."""
    behind = [] if ctx.pending is None else [ctx.pending]
    states = jnp.concatenate([state[:, None], *behind], axis=1)  # that of the text is first
    for start, end in zip(ctx.levels, ctx.levels[1:], strict=False):
        place = jnp.broadcast_to(1 + ctx.parent[:, start:end], (len(state), end - start))
        above = jnp.take_along_axis(states, place[..., None], axis=1)
        states = jnp.concatenate([states, keep * above + new[:, start:end]], axis=1)
    return states[:, 1:]
