"""`jaxinfer transport A B`: the distance R_rho between two files of points."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.cli.notices import note
from jaxinfer.typing import Json

if TYPE_CHECKING:
    from jaxinfer.theory.transport import RRhoOutput

METHODS = (
    "auto, alternating (exact), sampled (for more than some 20,000 points), bounds (one pass) or "
    "sign_ascent (the paper's loop; slow)."
)
WEIGHTS = "A .npy file of weights that add up to 1, one for each point of"


def transport(
    one: Annotated[Path, typer.Argument(metavar="A.npy", help="Points, one a row.")],
    other: Annotated[Path, typer.Argument(metavar="B.npy", help="Points to compare with.")],
    rho: Annotated[float, typer.Option("--rho", help="Exponent, above 1 and at most 10.")] = 1.1,
    method: Annotated[str, typer.Option("--method", help=METHODS)] = "auto",
    tol: Annotated[
        float, typer.Option("--tol", help="Relative width of the bracket at which it ends.")
    ] = 1e-3,
    a: Annotated[
        Path | None, typer.Option("--a", help=f"{WEIGHTS} A; uniform if left out.")
    ] = None,
    b: Annotated[
        Path | None, typer.Option("--b", help=f"{WEIGHTS} B; uniform if left out.")
    ] = None,
    seed: o.SeedOption = 0,
    as_json: o.JsonOption = False,
) -> None:
    """How far apart two clouds of points are, by R_rho (arXiv 2307.10042), with a bracket.

    R_rho is a relaxation of the earth mover's distance that needs no memory for all pairs. Files
    are of numpy.save, float32 or float64.

    Example: jaxinfer transport keys.npy compressed.npy --rho 1.1
    """
    from jaxinfer.theory.transport.points_file import read_points

    x, y = read_points(one), read_points(other)
    weights = [None if path is None else read_points(path) for path in (a, b)]

    from jaxinfer.theory.transport import r_rho

    found = r_rho(x, y, *weights, rho=rho, method=method, tol=tol, seed=seed)
    _advise(found, tol)
    if as_json:
        return o.print_json(_record(found, rho, len(x), len(y)))
    share = "" if len(x) != len(y) else f", per point {per_point(found.value, rho, len(x)):.6g}"
    print(f"R_rho      {found.value:.6g}{share}")
    kind = "bracket" if found.exact else "interval (99 %)"
    print(f"{kind:<10} {found.lower:.6g} to {found.upper:.6g}")
    print(f"saturation {found.saturation:.3f} of the product coupling's cost")
    print(f"method     {found.method}, {found.sweeps} sweeps")


def per_point(value: float, rho: float, n: int) -> float:
    """R / n^(1/s), which does not grow with n for pairs of points."""
    return value / n ** ((rho - 1) / rho)


def _advise(found: "RRhoOutput", tol: float) -> None:
    from jaxinfer.theory.transport.certified import SATURATED

    if found.lift:
        note(f"the clouds share points; every distance was lifted by {found.lift:.3g}")
    if not found.converged and found.method not in ("bounds", "sampled"):
        note(f"the bracket is wider than --tol {tol:g}: float64 points or a larger rho help")
    if found.saturation > SATURATED:
        note(
            "the distance is near that of the product coupling and says little; reduce the "
            "dimensions or compare debiased values (ji.theory.transport.debiased)"
        )


def _record(found: "RRhoOutput", rho: float, n: int, m: int) -> Json:
    fields = dataclasses.asdict(found)
    alpha, beta = fields.pop("potentials")
    potentials = {"alpha": alpha.tolist(), "beta": beta.tolist()}
    share = per_point(found.value, rho, n) if n == m else None
    return {"rho": rho, "points": [n, m], **fields, "per_point": share, "potentials": potentials}
