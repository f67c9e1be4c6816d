"""The token mixer of a layer: what the stack, and all that handles caches, needs of it.

`read` never writes. It returns the mixed activations and what this call adds ("fresh"), and
`commit` later brings the accepted part of it into the layer's state. Attention is one mixer
(`jaxinfer.models.attention`); a recurrent one keeps a state of fixed size and steps along
`StepContext.parent`.
"""

from collections.abc import Sequence

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxinfer.cache.base import Geometry
from jaxinfer.cache.context import CommitContext, StepContext
from jaxinfer.cache.policy import Policy
from jaxinfer.config import ModelConfig
from jaxinfer.typing import Leaf, Params


class Mixer:
    """One kind of token mixer; without state of its own. Parameters and states are of one layer.

    Required are `abstract_params`, `init`, `read`, `commit` and `bytes_per_row`.

    `truncates`: states are cut to their first tokens where the policy says so
    (`Policy.can_truncate`).
    """

    truncates = False
    divides = False
    """Whether the devices of a stage divide its heads, so that their outputs are to be added."""
    reads_norm: tuple[str, ...] = ()
    """Names of the linear layers that read what the norm in front puts out, if only they do."""

    def abstract_params(self, cfg: ModelConfig, layer: int, dtype: DTypeLike) -> Params:
        """The layer's parameters as `jax.ShapeDtypeStruct` leaves."""
        raise NotImplementedError

    def initialised(self, cfg: ModelConfig, params: Params, key: jax.Array) -> Params:
        """Random parameters of a layer with those drawn anew that start in a way of their own."""
        return params

    def served(self, cfg: ModelConfig, params: Params) -> Params:
        """The parameters as steps read them: what is the same in every step is computed once."""
        return params

    def policy(self, cfg: ModelConfig, params: Params, policy: Policy) -> Policy:
        """`policy` as a layer with these parameters keeps its state; what all other methods get."""
        return policy

    def check(self, cfg: ModelConfig, policy: Policy, geometry: Geometry) -> None:
        """Refuses, with the remedy, a policy that it cannot keep its state under."""

    def reach(self, cfg: ModelConfig, layer: int) -> int | None:
        """The longest text that the layer can read; None without such a limit."""
        return None

    def init(self, cfg: ModelConfig, policy: Policy, geometry: Geometry, batch: int) -> Leaf:
        """The state of `batch` empty rows."""
        raise NotImplementedError

    def prepare(self, cfg: ModelConfig, policy: Policy, ctx: StepContext) -> Leaf:
        """What layers of the same policy share in one pass, such as rotations."""
        return None

    def read(
        self,
        cfg: ModelConfig,
        policy: Policy,
        params: Params,
        state: Leaf,
        x: Array,
        ctx: StepContext,
        prepared: Leaf,
        layer: int,
    ) -> tuple[Array, Leaf]:
        """The mixed activations [B, T, D], and all that is not committed yet: what `ctx.pending`
        holds, then the T tokens, along the axis by which `commit` indexes."""
        raise NotImplementedError

    def commit(
        self,
        cfg: ModelConfig,
        policy: Policy,
        params: Params,
        state: Leaf,
        fresh: Leaf,
        ctx: CommitContext,
    ) -> Leaf:
        """The state behind the accepted fresh tokens."""
        raise NotImplementedError

    def budgeted(self, policy: Policy, state: Leaf, contexts: Sequence[int]) -> Leaf:
        """An empty state whose rows take budgets that are shares of `contexts[b]` tokens."""
        return state

    def grow(self, policy: Policy, state: Leaf, capacity: int) -> Leaf:
        """The state with room for `capacity` tokens; one of fixed size stays as it is."""
        return state

    def bytes_per_row(self, cfg: ModelConfig, policy: Policy, geometry: Geometry) -> int:
        """Bytes of the state of one row."""
        raise NotImplementedError

    def floats_per_token(self, cfg: ModelConfig, keys: int) -> int:
        """Numbers that a pass holds for each of its tokens, where it looks at `keys` at a time."""
        return 4 * cfg.hidden_size

    def signature(self, params: Params) -> list[Leaf]:
        """The matrices that tell the layer from those of other models (`fingerprint`)."""
        return [part["weight"] for part in params.values() if "weight" in part]
