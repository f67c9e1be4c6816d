"""The methods that learned selection is compared with, by name.

Each takes a calibrated model, a density (the share that a token uses: of the neurons of every
feed-forward block, or for TEAL and WINA of the products of every layer) and the neurons of a block,
and returns parameters that share the model's weights. `jaxinfer.sparsity.accounting` says what each
reads and multiplies.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import one_of, real, whole
from jaxinfer.config import ModelConfig
from jaxinfer.nn.linear import rows
from jaxinfer.sparsity import moefication
from jaxinfer.sparsity.allocation import STEP, Allocation
from jaxinfer.sparsity.base import Rule, Static
from jaxinfer.sparsity.calibration import Calibration, threshold_at
from jaxinfer.sparsity.controls import Random
from jaxinfer.sparsity.masked import (
    ChosenByPrompt,
    Criterion,
    LargeGate,
    LargestHidden,
    MaskedMlp,
    in_blocks,
)
from jaxinfer.sparsity.mlp import SparseMlp
from jaxinfer.typing import Params


def oracle(calibration: Calibration, density: float, block_size: int = 1) -> Params:
    """The neurons, or blocks of them, with the largest hidden values: what no selection that is
    made before them can beat by much (arXiv 2310.17157, section 3.1)."""

    def criterion(layer: int, neurons: int) -> Criterion:
        most = jnp.int32(units_at(neurons, density, block_size))
        return LargestHidden(most=most, size=block_size)

    return _masked(calibration, criterion)


def contribution_oracle(calibration: Calibration, density: float, block_size: int = 1) -> Params:
    """`oracle` by what a neuron adds to the output: its value times the norm of its row of
    `down`."""
    downs = [layer["mlp"]["down"]["weight"] for layer in calibration.params["layers"]]

    def criterion(layer: int, neurons: int) -> Criterion:
        down = rows(downs[layer], jnp.arange(downs[layer].shape[0])).astype(jnp.float32)
        most = jnp.int32(units_at(neurons, density, block_size))
        return LargestHidden(most=most, norms=jnp.linalg.norm(down, axis=0), size=block_size)

    return _masked(calibration, criterion)


def random(
    calibration: Calibration, density: float, block_size: int = 1, *, seed: int = 0
) -> Params:
    """Random neurons or blocks, others for every token."""

    def selector(layer: int, neurons: int) -> Random:
        rule = Rule(most=units_at(neurons, density, block_size))
        number = neurons // block_size
        return Random(number=number, rule=rule, seed=seed * calibration.cfg.num_layers + layer)

    return _selected(calibration, selector)


def static(calibration: Calibration, density: float, block_size: int = 1) -> Params:
    """The neurons or blocks that are most active on the calibration text, for every token."""

    def selector(layer: int, neurons: int) -> Static:
        activity = calibration.activity[layer]
        return _static(activity, units_at(neurons, density, block_size), block_size)

    return _selected(calibration, selector)


def cats(calibration: Calibration, density: float, block_size: int = 1) -> Params:
    """The neurons whose activated gate exceeds a threshold that the calibration text sets for each
    layer (CATS, arXiv 2404.08763); without a gate, whose hidden value does."""
    del block_size
    share = check_density(density)

    def criterion(layer: int, neurons: int) -> Criterion:
        return LargeGate(threshold=jnp.float32(threshold_at(calibration.gates[layer], share)))

    return _masked(calibration, criterion)


def teal(
    calibration: Calibration, density: float, block_size: int = 1, *, allocate: str = "greedy"
) -> Params:
    """The inputs of every weight that exceed a threshold that the calibration text sets (TEAL,
    arXiv 2408.14690), by its greedy allocation or "uniform". Unlike in that paper's tables all
    tokens are sparse, those of the prompt too."""
    del block_size
    greedy = one_of("allocate", allocate, ("greedy", "uniform")) == "greedy"
    allocation = _allocation(calibration, weighted=False)
    return allocation.params(check_density(density), greedy=greedy)


def wina(
    calibration: Calibration, density: float, block_size: int = 1, *, allocate: str = "greedy"
) -> Params:
    """The inputs of every weight with the largest magnitude times the norm of the weight's column
    (WINA, arXiv 2505.19427), as many as TEAL's greedy allocation gives or "uniform". Weights stay
    as they are: the paper's rotation to orthogonal columns is left out."""
    del block_size
    greedy = one_of("allocate", allocate, ("greedy", "uniform")) == "greedy"
    allocation = _allocation(calibration, weighted=True)
    return allocation.params(check_density(density), greedy=greedy)


def griffin(calibration: Calibration, density: float, block_size: int = 1) -> Params:
    """The neurons that a text's first half chooses for its second (GRIFFIN, arXiv 2404.01365), for
    texts that are read in one piece; `of_prompt` for generation."""

    def criterion(layer: int, neurons: int) -> Criterion:
        most = jnp.int32(units_at(neurons, density, block_size))
        return ChosenByPrompt(most=most, size=block_size)

    return _masked(calibration, criterion)


def of_prompt(
    cfg: ModelConfig, params: Params, prompt: Any, density: float, block_size: int = 1
) -> Params:
    """The model that goes on with one prompt (token ids) by GRIFFIN's choice of neurons. The prompt
    itself is for the dense model to read."""
    calibration = Calibration(cfg, params, np.asarray(prompt)[None])

    def selector(layer: int, neurons: int) -> Static:
        (scores,) = calibration.prompt_scores[layer]
        return _static(scores, units_at(neurons, density, block_size), block_size)

    return _selected(calibration, selector)


def moefication_oracle(calibration: Calibration, density: float, block_size: int = 32) -> Params:
    """The blocks with the most activation, of neurons that are grouped by their input weights:
    MoEfication (arXiv 2110.01786) with its ground-truth selection, an oracle."""
    grouped = moefication.experts(calibration, block_size)

    def block(layer: int, dense: Params) -> MaskedMlp:
        most = units_at(dense["up"]["weight"].shape[0], density, block_size)
        criterion = LargestHidden(most=jnp.int32(most), size=block_size)
        return MaskedMlp(dense=grouped[layer].block, criterion=criterion)

    return _with_blocks(calibration.params, block)


def moefication_router(calibration: Calibration, density: float, block_size: int = 32) -> Params:
    """MoEfication with the router that its authors train, on the calibration text."""
    grouped = moefication.experts(calibration, block_size)
    learned = moefication.routers(calibration, block_size)

    def block(layer: int, dense: Params) -> SparseMlp:
        rule = Rule(most=units_at(dense["up"]["weight"].shape[0], density, block_size))
        inner, outer = learned[layer]
        router = moefication.ExpertRouter(inner=inner, outer=outer, rule=rule)
        return SparseMlp.of(grouped[layer].block, router)

    return _with_blocks(calibration.params, block)


def units_at(neurons: int, density: float, block_size: int) -> int:
    """How many blocks a token uses, at least 1.

    Raises:
      ValueError: the density is outside (0, 1], or the blocks do not divide the neurons.
    """
    density = check_density(density)
    size = whole("block_size", block_size, most=neurons)
    if neurons % size:
        raise ValueError(
            f"block_size must divide the {neurons} neurons of a feed-forward block, got {size}"
        )
    return max(round(density * (neurons // size)), 1)


def check_density(density: object) -> float:
    """A share above 0 and at most 1.

    Raises:
      ValueError: anything else.
    """
    share = real("density", density, 0, 1)
    if share == 0:
        raise ValueError("density must be above 0 and at most 1, got 0")
    return share


def _static(scores: np.ndarray, most: int, size: int) -> Static:
    units = np.asarray(in_blocks(jnp.asarray(scores), size))
    selected = np.zeros(len(units), bool)
    selected[np.argsort(-units, kind="stable")[:most]] = True
    return Static(selected=jnp.asarray(selected))


def _masked(calibration: Calibration, criterion: Callable[[int, int], Criterion]) -> Params:
    def block(layer: int, dense: Params) -> MaskedMlp:
        return MaskedMlp(dense=dense, criterion=criterion(layer, dense["up"]["weight"].shape[0]))

    return _with_blocks(calibration.params, block)


def _selected(calibration: Calibration, selector: Callable[[int, int], Any]) -> Params:
    def block(layer: int, dense: Params) -> SparseMlp:
        return SparseMlp.of(dense, selector(layer, dense["up"]["weight"].shape[0]))

    return _with_blocks(calibration.params, block)


def _with_blocks(params: Params, block: Callable[[int, Params], Any]) -> Params:
    layers = tuple(
        layer | {"mlp": block(index, layer["mlp"])} for index, layer in enumerate(params["layers"])
    )
    return params | {"layers": layers}


def _allocation(calibration: Calibration, *, weighted: bool) -> Allocation:
    """One search serves all densities."""
    key = "allocation", weighted
    if key not in calibration.memory:
        calibration.memory[key] = Allocation(calibration, weighted=weighted, step=STEP)
    return calibration.memory[key]
