"""The methods of sparsity that a table compares, from names and densities."""

from collections.abc import Sequence

from jaxinfer.names import sparsity_of
from jaxinfer.plugins import meant
from jaxinfer.sparsity.baseline import BASELINES, BY_TEXT, Baseline
from jaxinfer.sparsity.baselines import check_density
from jaxinfer.sparsity.calibration import Calibration
from jaxinfer.sparsity.method import Sparsity

DENSITIES = (0.75, 0.5, 0.375, 0.25)


def methods_at(
    names: Sequence[str],
    densities: Sequence[float],
    *,
    block_size: int = 1,
    calibration: Calibration | None = None,
) -> list[Sparsity]:
    """Every baseline at every density; other methods as `lm.generate(sparsity=...)` takes them, at
    every density where they take one (DejaVu), else once, at their own (LTE).

    Raises:
      ValueError: an unknown name, a density outside (0, 1], or no names or densities.
    """
    if not names or not densities:
        raise ValueError("name at least one method and one density")
    for density in densities:
        check_density(density)
    found: list[Sparsity] = []
    for name in names:
        if name in BASELINES:
            found += [
                Baseline(name=name, density=x, block_size=block_size, calibration=calibration)
                for x in densities
            ]
            continue
        try:
            method = sparsity_of(name)
        except ValueError as error:
            known = f"{meant(name, BASELINES)} baselines are {', '.join(BASELINES)}"
            raise ValueError(f"{error};{known}") from error
        several = method is not None and method.name == "deja_vu"
        arguments = [{"name": name, "density": x} for x in densities] if several else [name]
        found += [one for one in map(sparsity_of, arguments) if one is not None]
    return found


def needs_text(names: Sequence[str]) -> bool:
    """Whether one of the methods learns from a calibration text."""
    return any(name in BY_TEXT for name in names)
