"""The methods of sparsity that a table compares, from names and densities."""

from collections.abc import Sequence
from pathlib import Path

from jaxinfer.names import sparsity_of
from jaxinfer.plugins import meant
from jaxinfer.sparsity.baseline import BASELINES, BY_TEXT, Baseline
from jaxinfer.sparsity.baselines import check_density
from jaxinfer.sparsity.calibration import Calibration
from jaxinfer.sparsity.method import Sparsity

DENSITIES = (0.75, 0.5, 0.375, 0.25)
NEURONS = "-neurons"
"""Behind the name of a baseline: single neurons, whatever the size of the others' blocks."""


def methods_at(
    names: Sequence[str],
    densities: Sequence[float],
    *,
    block_size: int = 1,
    calibration: Calibration | None = None,
    model: str = "",
) -> list[tuple[str, Sparsity]]:
    """Every baseline at every density, in single neurons where `NEURONS` stands behind its name;
    other methods as `lm.generate(sparsity=...)` takes them, at every density where they take one
    (DejaVu), else once, at their own (LTE). Each with the name that it was given, of a path the
    last part. `model` is the name of the model, whose artefact a trained method takes where none is
    named.

    Raises:
      ValueError: an unknown name, a density outside (0, 1], or no names or densities.
    """
    check_methods(names, densities, model)
    found: list[tuple[str, Sparsity]] = []
    for name in names:
        if (baseline := name.removesuffix(NEURONS)) in BASELINES:
            size = block_size if baseline == name else 1
            options = {"block_size": size, "calibration": calibration}
            found += [(name, Baseline(name=baseline, density=x, **options)) for x in densities]
            continue
        method = sparsity_of(name, model)
        several = method is not None and method.name == "deja_vu"
        arguments = [{"name": name, "density": x} for x in densities] if several else [name]
        made = [sparsity_of(one, model) for one in arguments]
        found += [(Path(name).name, one) for one in made if one is not None]
    return found


def check_methods(names: Sequence[str], densities: Sequence[float], model: str = "") -> None:
    """Refuses what `methods_at` would, before a model is loaded."""
    if not names or not densities:
        raise ValueError("name at least one method and one density")
    for density in densities:
        check_density(density)
    for name in names:
        if name.removesuffix(NEURONS) in BASELINES:
            continue
        try:
            sparsity_of(name, model)
        except ValueError as error:
            known = f"{meant(name, BASELINES)} baselines are {', '.join(BASELINES)}"
            raise ValueError(f"{error};{known}") from error


def needs_text(names: Sequence[str]) -> bool:
    """Whether one of the methods learns from a calibration text."""
    return any(name.removesuffix(NEURONS) in BY_TEXT for name in names)
