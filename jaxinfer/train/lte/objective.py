"""What each stage minimises, as losses for `jaxinfer.train.loop.fit`.

A batch is {"tokens": i32[B, T], "fixed": see `student`} with "separation", this step's lambda, in
stage 1, and "mask" bool[B, T] where some tokens are padding: these count in no mean.

Axis letters: R rows (tokens), J blocks, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.config import ModelConfig
from jaxinfer.nn.block_mlp import weighted_block_mlp
from jaxinfer.nn.mlp import feed_forward
from jaxinfer.sparsity.base import Router
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.sparsity.router import soft, straight_through
from jaxinfer.train.language_model import token_losses
from jaxinfer.train.loop import Loss
from jaxinfer.train.lte.losses import RouterStatistics, statistics
from jaxinfer.train.lte.recipe import LteRecipe
from jaxinfer.train.lte.student import Student
from jaxinfer.typing import Leaf, Params

GATES = {"soft": soft, "straight_through": straight_through}
PROPORTIONAL = 0.5  # of the controller, in the logarithm of eta per logarithm of density
LEAST_DENSITY = 1e-3  # what the controller takes an empty layer for


def learning(student: Student) -> Loss:
    """The loss of stage 1: routers and model together (arXiv 2402.06126, equation 6)."""
    cfg, recipe = student.config, student.recipe
    gate = GATES[recipe.method]

    def loss(trained: Params, batch: Any, key: Array):
        del key
        state = batch["fixed"] | trained
        seen: list[RouterStatistics] = []

        def gated(cfg: ModelConfig, block: Params, x: Array, layer: int) -> Array:
            router = student.router(state["routers"][layer])
            flat = x.reshape(-1, x.shape[-1])
            logits = router.scores(flat)
            seen.append(statistics(logits, router.rule(logits), _inputs(batch), recipe.epsilon))
            weights = SparseMlp.of(block, router).weights
            y = weighted_block_mlp(weights, flat, gate(logits), activation=cfg.activation)
            return y.astype(x.dtype).reshape(x.shape)

        task = _task(token_losses(cfg, student.model(state), batch["tokens"], mlp=gated), batch)
        found = _by_layer(seen)
        density = jax.lax.stop_gradient(found.density.mean())
        eta, steering = steered(recipe, state, density)
        apart = batch["separation"] * found.separation.mean()
        total = task + eta * found.efficiency.mean() + apart + steering
        return total, {"task": task, "eta": eta, "lambda": batch["separation"]} | _logged(found)

    return loss


def serving(student: Student) -> Loss:
    """The loss of the model as it serves: stage 2, and both stages of what LTE is compared with."""
    cfg, epsilon = student.config, student.recipe.epsilon

    def loss(trained: Params, batch: Any, key: Array):
        del key
        seen: list[RouterStatistics] = []

        def watched(cfg: ModelConfig, block: Leaf, x: Array, layer: int) -> Array:
            if isinstance(block, SparseMlp) and isinstance(router := block.selector, Router):
                logits = router.scores(x.reshape(-1, x.shape[-1]))
                seen.append(statistics(logits, router.rule(logits), _inputs(batch), epsilon))
            return feed_forward(cfg, block, x, layer)

        params = student.sparse_model(batch["fixed"] | trained)
        task = _task(token_losses(cfg, params, batch["tokens"], mlp=watched), batch)
        return task, {"task": task} | (_logged(_by_layer(seen)) if seen else {})

    return loss


def steered(recipe: LteRecipe, state: Params, density: Array) -> tuple[Array, Array]:
    """eta, and a term of value 0 whose gradient for `log_eta` is minus what eta has to rise by.

    Where a density is wanted, eta is a multiplier that a controller steers: log eta is the sum of
    all errors log(density / target) so far, by plain gradient descent, and a part of the present
    one. So it is among the parameters, and a resumed run goes on with it.
    """
    if recipe.target_density is None:
        return jnp.float32(recipe.eta), jnp.float32(0.0)
    error = jnp.log(jnp.maximum(density, LEAST_DENSITY) / recipe.target_density)
    log_eta = state["log_eta"]
    frozen = jax.lax.stop_gradient(log_eta)
    return jnp.exp(frozen + PROPORTIONAL * error), -error * (log_eta - frozen)


def _inputs(batch: Any) -> Array | None:
    """Which rows are tokens of a text, of the inputs."""
    return batch["mask"][:, :-1].reshape(-1) if "mask" in batch else None


def _task(losses: Float[Array, "B T"], batch: Any) -> Array:
    if "mask" not in batch:
        return losses.mean()
    wanted = batch["mask"][:, 1:]
    return jnp.where(wanted, losses, 0).sum() / jnp.maximum(wanted.sum(), 1)


def _by_layer(seen: list[RouterStatistics]) -> RouterStatistics:
    """f32[L] each."""
    return RouterStatistics(*(jnp.stack(values) for values in zip(*seen, strict=True)))


def _logged(found: RouterStatistics) -> dict[str, Array]:
    whole = {name: value.mean() for name, value in found._asdict().items()}
    for name in ("density", "empty"):
        values = getattr(found, name)
        whole |= {f"{name}_{layer}": values[layer] for layer in range(len(values))}
    return whole
