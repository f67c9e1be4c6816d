"""How a model is trained to be efficient, and what that is compared with."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxinfer.arguments import one_of, real, whole
from jaxinfer.sparsity.router import Start

Method = Literal["straight_through", "soft", "random", "dense"]
Trainable = Literal["all", "mlp", "adapters"]


@dataclass(frozen=True, kw_only=True)
class LteRecipe:
    """`method` says what multiplies a block's output in stage 1: "soft" its score, as in the paper;
    "straight_through" 1 or 0, with the gradient of the score. The others are compared with these:
    "random" selects by routers that are drawn and never trained, "dense" has none (and MoEfication,
    `jaxinfer.sparsity.moefication`, trains routers behind what it leaves).

    `eta` is the weight of the mean squared score; with `target_density` it is steered instead,
    which is ours: `eta` is then where it begins. `separation` is the paper's lambda, with `ramp`
    growing from 0 over stage 1; `epsilon` bounds its term. `trainable`: everything, the
    feed-forward blocks, or adapters of rank `rank` beside their weights; the routers always.
    """

    method: Method = "straight_through"
    start: Start = "all_on"
    eta: float = 0.1
    separation: float = 0.0
    ramp: bool = False
    epsilon: float = 1e-2
    target_density: float | None = None
    block_size: int = 32
    grouped: bool = True  # by k-means; False leaves the neurons in their order
    trainable: Trainable = "all"
    rank: int = 8
    steps: int = 600  # of stage 1
    adapt_steps: int = 600  # of stage 2
    batch: int = 8
    learning_rate: float = 1e-3
    router_rate: float = 1.0  # times the learning rate
    seed: int = 0

    def __post_init__(self):
        one_of("method", self.method, get_args(Method))
        one_of("start", self.start, get_args(Start))
        one_of("trainable", self.trainable, get_args(Trainable))
        for name in ("block_size", "rank", "batch"):
            whole(name, getattr(self, name))
        for name in ("steps", "adapt_steps"):
            whole(name, getattr(self, name), 2)
        for name in ("eta", "separation"):
            real(name, getattr(self, name), 0.0)
        for name in ("epsilon", "learning_rate", "router_rate"):
            real(name, getattr(self, name), 1e-12)
        if self.target_density is not None:
            real("target_density", self.target_density, 1e-3, 1.0)
        elif self.method == "random":
            raise ValueError("random routers select a fixed number of blocks; give target_density")

    @property
    def learns_routers(self) -> bool:
        """Whether stage 1 trains them."""
        return self.method in ("straight_through", "soft")

    @property
    def is_steered(self) -> bool:
        """Whether eta follows the density."""
        return self.learns_routers and self.target_density is not None


PRESETS: dict[str, dict[str, Any]] = {
    "ste": {},
    "paper": {"method": "soft", "start": "normal", "eta": 1.0, "separation": 0.5},
    "ramp": {"method": "soft", "start": "normal", "eta": 1.0, "separation": 0.5, "ramp": True},
    "random": {"method": "random", "start": "normal"},
    "dense": {"method": "dense"},
}
"""The paper's recipe is "paper"; "ramp" is that with a separation that grows. "ste" is ours."""


def preset(name: str, **changes: Any) -> LteRecipe:
    """A recipe by name, with some fields changed; None leaves a field as the preset has it.

    Raises:
      ValueError: there is none of that name, or a field makes no sense.
    """
    known = PRESETS[one_of("preset", name, PRESETS)]
    changes = {field: value for field, value in changes.items() if value is not None}
    return LteRecipe(**(known | changes))
