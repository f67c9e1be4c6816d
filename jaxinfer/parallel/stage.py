"""`Stage`: some layers of a model on some devices, with the caches of the rows that run.

A stage is a pure function of its parameters, its caches and what the stage before sends; it knows
nothing of sampling. Rows stand in groups of fixed size, each with a cache of its own, so that the
groups follow each other through the stages of a pipeline. A prompt is read into a cache of one row,
which then enters a group. Every call says where its rows stand, and one that does not fit what the
caches hold is refused: late, doubled or lost messages change nothing.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxinfer.arguments import whole
from jaxinfer.cache.context import chain_context
from jaxinfer.cache.policy import Cache, Policy
from jaxinfer.config import ModelConfig
from jaxinfer.decode.engine import with_feature_maps
from jaxinfer.models.mixers import mixer_of
from jaxinfer.models.params import served_params
from jaxinfer.models.part import check_layers, ends_of
from jaxinfer.models.stack import blocks, cache_geometry, check_cache, commit, embed, unembed
from jaxinfer.nn.norm import norm
from jaxinfer.parallel.shard import (
    AXIS,
    check_divisible,
    mesh_of,
    on_mesh,
    padded_config,
    place_cache,
    shard_params,
)
from jaxinfer.runtime.backend import Backend
from jaxinfer.runtime.program import Program
from jaxinfer.typing import Params


class OutOfStep(RuntimeError):
    """A call does not fit what the caches hold."""


class Stage:
    """The layers `layers` of a model.

    Args:
      cfg: the whole model's configuration.
      params: the part of its parameters (`jaxinfer.models.part.part_of`).
      layers: which layers they are.
      policy: of the whole model, sized (`Policy.sized`).
      capacity: tokens of a row at most.
      groups, rows: groups of rows, and rows of each.
      mesh: the devices that divide the layers; None is the first one.
      backend: of caches and computation.

    Raises:
      ValueError: the model cannot be divided so, or not have the policy.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        layers: range,
        *,
        policy: Policy,
        capacity: int,
        groups: int = 1,
        rows: int = 1,
        mesh: Mesh | None = None,
        backend: Backend | None = None,
    ):
        check_layers(cfg, layers)
        if not layers:
            raise ValueError(f"a stage needs layers, got {layers}")
        self.layers, self.ends = layers, ends_of(cfg, layers)
        self.rows, self.groups = whole("rows", rows), whole("groups", groups)
        self.mesh = mesh_of(1) if mesh is None else mesh
        backend = Backend.of() if backend is None else backend
        backend = replace(backend, axis=AXIS if self.mesh.size > 1 else None)
        check_divisible(cfg, params, backend)
        leaf = jax.tree.leaves(params["layers"][0]["attn_norm"])[0]
        self.dtype = str(leaf.dtype)
        check_cache(cfg, policy, cache_geometry(cfg, capacity, self.dtype, backend))
        part = cfg.part(layers)
        self._policies = _policies(part, policy.part(layers), params)
        params = with_feature_maps(served_params(part, params), policy.part(layers))
        self.params = shard_params(part, params, self.mesh)
        self.config = padded_config(part, self.mesh.size)
        self._geometry = cache_geometry(self.config, capacity, self.dtype, backend)
        self.programs = {
            "run": Program(
                self._run, static_argnames=("reads", "is_prompt"), donate_argnames=("cache",),
                name="run",
            ),
            "insert": Program(_insert, donate_argnames=("cache",), name="insert"),
            "free": Program(_free, donate_argnames=("cache",), name="free"),
            "row_of": Program(_row_of, name="row_of"),
        }  # fmt: skip
        self.clear()

    def clear(self) -> None:
        """Forgets all rows."""
        self._caches = [self._empty([1] * self.rows) for _ in range(self.groups)]
        self._lengths = np.zeros((self.groups, self.rows), np.int64)
        self._reading: dict[int, tuple[Cache, int]] = {}

    def prefill(
        self, request: int, x: Array | np.ndarray, count: int, position: int, prompt: int
    ) -> Array:
        """Reads the next `count` tokens of a prompt into the cache of its own row.

        Args:
          request: its number.
          x: i32[1, T] tokens in a first stage, else activations [1, T, D].
          count: how many of the T are real.
          position: tokens that were read before; 0 begins anew.
          prompt: tokens of the whole prompt, of which budgets may be shares.

        Returns:
          Activations [1, T, D], or f32[1, 1, V], the logits behind the last token.

        Raises:
          OutOfStep: other tokens were read before.
        """
        if position == 0:
            self._reading[request] = self._empty([prompt]), 0
        cache, had = self._reading.get(request, (None, -1))
        if had != position:
            raise OutOfStep(f"request {request} has read {had} tokens, not {position}")
        assert cache is not None
        cache, y = self.programs["run"](
            self.params, cache, self._placed(x), jnp.asarray([count], jnp.int32),
            reads=position > 0, is_prompt=True,
        )  # fmt: skip
        self._reading[request] = cache, position + count
        return y

    def insert(self, request: int, group: int, row: int) -> None:
        """Puts a prompt that was read into a row, whatever was there.

        Raises:
          OutOfStep: no such prompt.
        """
        if request not in self._reading:
            raise OutOfStep(f"request {request} has read nothing")
        one, length = self._reading.pop(request)
        self._caches[group] = self.programs["insert"](self._caches[group], one, jnp.int32(row))
        self._lengths[group, row] = length

    def drop(self, request: int) -> None:
        """Forgets a prompt that is read, if there is one."""
        self._reading.pop(request, None)

    def step(
        self, group: int, x: Array | np.ndarray, active: Sequence[int], positions: Sequence[int]
    ) -> Array:
        """One token more in the `active` rows of a group.

        Args:
          group: its number.
          x: i32[B, 1] tokens in a first stage, else activations [B, 1, D].
          active: the rows that take part, whose caches take the token.
          positions: tokens that each of these rows must have.

        Returns:
          Activations [B, 1, D], or logits f32[B, 1, V].

        Raises:
          OutOfStep: a row has another number of tokens.
        """
        which = np.asarray(active, np.int64)
        found = self._lengths[group, which].tolist()
        if found != list(positions):
            raise OutOfStep(f"rows {list(active)} hold {found} tokens, not {list(positions)}")
        count = np.zeros(self.rows, np.int32)
        count[which] = 1
        self._caches[group], y = self.programs["run"](
            self.params, self._caches[group], self._placed(x), jnp.asarray(count), reads=True,
            is_prompt=False,
        )  # fmt: skip
        self._lengths[group] += count
        return y

    def free(self, group: int, row: int) -> None:
        """Empties a row, so that attention does not go as far as it did."""
        self._caches[group] = self.programs["free"](self._caches[group], jnp.int32(row))
        self._lengths[group, row] = 0

    def export_row(self, group: int, row: int) -> list[np.ndarray]:
        """What a row keeps, bit by bit, for `import_row` of a stage of the same layers, policy and
        degree of division."""
        one = self.programs["row_of"](self._caches[group], jnp.int32(row))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(one)]

    def import_row(self, request: int, arrays: Sequence[np.ndarray]) -> None:
        """Takes a row of another stage as a prompt that was read, to be inserted.

        Raises:
          ValueError: the arrays are not those of such a row.
        """
        empty = self._empty([1])
        leaves, tree = jax.tree.flatten(empty)
        ours = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        theirs = [(x.shape, str(x.dtype)) for x in arrays]
        if ours != theirs:
            raise ValueError(
                f"a row of this stage has arrays {ours}, got {theirs}; both stages need the same "
                "layers, policy, context and devices"
            )
        placed = [jax.device_put(x, leaf.sharding) for x, leaf in zip(arrays, leaves, strict=True)]
        cache = jax.tree.unflatten(tree, placed)
        self._reading[request] = cache, int(np.asarray(cache.length)[0])

    def _empty(self, contexts: Sequence[int]) -> Cache:
        layers = []
        for layer, policy in zip(self.params["layers"], self._policies, strict=True):
            mixer = mixer_of(layer)[1]
            state = mixer.init(self.config, policy, self._geometry, len(contexts))
            layers.append(mixer.budgeted(policy, state, contexts))
        cache = Cache(
            length=jnp.zeros((len(contexts),), jnp.int32),
            layers=tuple(layers),
            policies=self._policies,
            backend=self._geometry.backend,
        )
        return place_cache(self.params, cache, self.mesh)

    def _placed(self, x: Array | np.ndarray) -> Array:
        return jax.device_put(
            x, jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        )

    def _run(
        self, params: Params, cache: Cache, x: Array, count: Array, reads: bool, is_prompt: bool
    ) -> tuple[Cache, Array]:
        one = functools.partial(
            stage_pass, self.config, self.ends, reads=reads, is_prompt=is_prompt
        )
        return on_mesh(one, self.mesh)(params, cache, x, count)


def stage_pass(
    cfg: ModelConfig,
    ends: tuple[bool, bool],
    params: Params,
    cache: Cache,
    x: Int[Array, "B T"] | Float[Array, "B T D"],
    count: Int[Array, " B"],
    *,
    reads: bool,
    is_prompt: bool,
) -> tuple[Cache, Float[Array, "B _ _"]]:
    """The cache behind each row's first `count` tokens, and what goes on: activations, or behind
    the last layer the logits of the last token."""
    is_first, is_last = ends
    valid = count if is_prompt else jnp.ones_like(count)
    ctx = chain_context(cache.length, valid, x.shape[1], reads=reads, is_prompt=is_prompt)
    ctx = replace(ctx, backend=cache.backend)
    x = embed(cfg, params, x, ctx) if is_first else x
    x, fresh = blocks(cfg, params, cache, x, ctx)
    if is_last:
        hidden = norm(params["final_norm"], x, kind=cfg.norm, eps=cfg.norm_eps)
        last = jnp.maximum(valid - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        x = unembed(cfg, params, hidden, cache.backend)
    return commit(cfg, params, cache, fresh, None, count, x, is_prompt=is_prompt), x


def _policies(cfg: ModelConfig, policy: Policy, params: Params) -> tuple[Policy, ...]:
    """How each layer of a part keeps its state."""
    pairs = zip(params["layers"], policy.layer_policies(cfg.num_layers), strict=True)
    found = []
    for layer, one in pairs:
        name, mixer = mixer_of(layer)
        found.append(mixer.policy(cfg, layer[name], one))
    return tuple(found)


def _insert(cache: Cache, one: Cache, row: Int[Array, ""]) -> Cache:
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=0)
    return jax.tree.map(put, cache, one)


def _free(cache: Cache, row: Int[Array, ""]) -> Cache:
    return replace(cache, length=cache.length.at[row].set(0))


def _row_of(cache: Cache, row: Int[Array, ""]) -> Cache:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0), cache)
