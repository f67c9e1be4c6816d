"""R_rho in figures: its values against the earth mover's distance, sweeps, the paper's loop, the
sampled method, when the distance informs, and time and memory beside POT, OTT-JAX and Sinkhorn.

    python tools/reproduce/reproduce_r_rho.py figures [--quick] [--only values,sweeps]
    python tools/reproduce/reproduce_r_rho.py measure exact 4096

The paper (arXiv 2307.10042) has no experiments and no code, so nothing here is a number of its own
to reach; instances are made from seeds. "measure" is one row of "scale", in a process of its own,
whose peak memory it reports. All write to `bench/results/`.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import RESULTS, publish_records

RHOS = (1.05, 1.1, 1.25, 1.5, 2.0)
SEED = 0
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Cloud(NamedTuple):
    x: np.ndarray
    y: np.ndarray


class Figure(NamedTuple):
    """Rows, what to draw, and what a reader must know."""

    title: str
    rows: list[dict[str, Any]]
    plot: Callable[[Any], None]
    caveat: str


def gauss(n: int, d: int, shift: float = 0.5, seed: int = SEED) -> Cloud:
    rng = np.random.default_rng(seed)
    return Cloud(rng.normal(size=(n, d)), rng.normal(size=(n, d)) + shift)


def clusters(n: int, d: int, seed: int = SEED) -> Cloud:
    """Twenty clusters, in which both clouds take part."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, d)) * 3
    noise = rng.normal(size=(2, n, d)) * 0.7
    x, y = (centres[rng.integers(0, 20, n)] + one for one in noise)
    return Cloud(x, y + 0.3)


def values(quick: bool) -> Figure:
    """R over the earth mover's distance against rho, and the bounds of one pass."""
    import ot

    from jaxinfer.theory import r_rho

    n = 40 if quick else 200
    x, y = gauss(n, 8)
    uniform = np.full(n, 1 / n)
    emd = ot.emd2(uniform, uniform, np.linalg.norm(x[:, None] - y, axis=2))
    rows = []
    for rho in (1.02, *RHOS) if quick else (1.005, 1.01, 1.02, *RHOS, 3.0, 5.0):
        found, bounds = (
            r_rho(x, y, rho=rho, tol=tol, method=method)
            for tol, method in ((1e-4, "alternating"), (1e-3, "bounds"))
        )
        rows.append(
            {
                "rho": rho,
                "R": found.value,
                "R / EMD": found.value / emd,
                "paper's upper factor": n ** (2 * (rho - 1) / rho),
                "one-pass lower": bounds.lower,
                "product": bounds.upper,
                "saturation": found.saturation,
                "sweeps": found.sweeps,
            }
        )

    def plot(axes: Any) -> None:
        axes.plot([row["rho"] for row in rows], [row["R / EMD"] for row in rows], "o-", label="R")
        ends = [row["one-pass lower"] / emd for row in rows], [row["product"] / emd for row in rows]
        axes.fill_between([row["rho"] for row in rows], *ends, alpha=0.2, label="one-pass bounds")
        axes.set(xlabel="rho", ylabel="share of the earth mover's distance")
        axes.legend(frameon=False)

    return Figure(
        f"R_rho between the earth mover's distance and the product coupling (n = {n}, d = 8)",
        rows,
        plot,
        "The paper's upper factor holds and is loose. Near the product (saturation above "
        "0.95) the distance hardly depends on the clouds.",
    )


def sweeps(quick: bool) -> Figure:
    """Sweeps of the exact solver and steps of the paper's loop."""
    from jaxinfer.theory import r_rho

    n = 64 if quick else 256
    rows = []
    for name, cloud in (("gauss", gauss(n, 8)), ("clusters", clusters(n, 16))):
        for rho in RHOS:
            exact = r_rho(*cloud, rho=rho, tol=1e-3)
            paper = r_rho(*cloud, rho=rho, tol=1e-2, method="sign_ascent", most_sweeps=100)
            rows.append(
                {
                    "cloud": name,
                    "rho": rho,
                    "sweeps to 1e-3": exact.sweeps,
                    "R": exact.value,
                    "paper's loop, steps": paper.sweeps,
                    "its bracket": 1 - paper.lower / paper.upper,
                }
            )

    def plot(axes: Any) -> None:
        for name in ("gauss", "clusters"):
            kept = [row for row in rows if row["cloud"] == name]
            axes.loglog(
                [r["rho"] - 1 for r in kept], [r["sweeps to 1e-3"] for r in kept], "o-", label=name
            )
        axes.set(xlabel="rho - 1", ylabel="sweeps to a bracket of 1e-3")
        axes.legend(frameon=False)

    return Figure(
        f"Sweeps against rho (n = {n})",
        rows,
        plot,
        "The alternating Newton solver is this project's; the paper's loop runs with a step chosen "
        "by hand and halved, as its constants ask for 1e9 iterations and more.",
    )


def informs(quick: bool) -> Figure:
    """Two samples of one law, pairs with small errors, and a shift seen by the debiased value."""
    from jaxinfer.theory.transport import debiased, paired, r_rho

    n = 64 if quick else 200
    rows = []
    for d in (2, 8) if quick else (2, 8, 64):
        x, y = gauss(n, d, shift=0)
        found = r_rho(x, y, rho=1.1)
        rows.append(
            {
                "regime": "one law, two samples",
                "d": d,
                "R": found.value,
                "saturation": found.saturation,
            }
        )
        rng = np.random.default_rng(1)
        copies = x + 0.1 / np.sqrt(d) * rng.normal(size=x.shape)
        pairs = paired(x, copies, 1.1)
        rows.append(
            {
                "regime": "pairs, error 0.1",
                "d": d,
                "R": pairs.value,
                "identity": pairs.identity,
                "saturation": pairs.saturation,
            }
        )
        for shift in (0, 2):
            moved = y + shift * (np.arange(d) == 0)
            test = debiased(x, moved, 1.1, permutations=19 if quick else 200)
            rows.append(
                {"regime": f"debiased, shift {shift}", "d": d, "R": test.value, "p": test.p_value}
            )

    def plot(axes: Any) -> None:
        for regime in dict.fromkeys(row["regime"] for row in rows):
            kept = [row for row in rows if row["regime"] == regime]
            axes.plot([r["d"] for r in kept], [r["R"] for r in kept], "o-", label=regime)
        axes.set(
            xlabel="dimensions", ylabel="R_1.1 (pairs: per point)", xscale="log", yscale="symlog"
        )
        axes.legend(frameon=False)

    return Figure(
        f"When R_1.1 informs (n = {n})",
        rows,
        plot,
        "The raw value of two samples of one law does not shrink with their size in 8 dimensions "
        "and more; the value of pairs grows like n^(1/s), so it is given over n^(1/s).",
    )


def sampled(quick: bool) -> Figure:
    """What the sampled method loses against the share of pairs that it looks at."""
    import jax.numpy as jnp

    from jaxinfer.theory import r_rho
    from jaxinfer.theory.transport.problem import problem_of
    from jaxinfer.theory.transport.sampled import solve_sampled

    n = 1024 if quick else 4096
    rows = []
    for name, make in (("gauss", gauss), ("clusters", clusters)):
        x, y = (z.astype(np.float32) for z in make(n, 16))
        for rho in (1.25,) if quick else (1.1, 1.25):
            exact = r_rho(x, y, rho=rho, tol=1e-4)
            uniform = jnp.full(n, 1 / n, jnp.float32)
            problem, unit = problem_of(jnp.asarray(x), jnp.asarray(y), uniform, uniform, rho)
            for pairs in (64, 128) if quick else (128, 256, 512):
                found, _ = solve_sampled(problem, 1e-3, 200, SEED, pairs=pairs)
                rows.append(
                    {
                        "cloud": name,
                        "rho": rho,
                        "share of pairs": pairs / n,
                        "gap": 1 - float(found.bracket.lower * unit) / exact.value,
                    }
                )

    def plot(axes: Any) -> None:
        for name, rho in dict.fromkeys((row["cloud"], row["rho"]) for row in rows):
            kept = [row for row in rows if (row["cloud"], row["rho"]) == (name, rho)]
            axes.loglog(
                [r["share of pairs"] for r in kept],
                [max(r["gap"], 1e-6) for r in kept],
                "o-",
                label=f"{name}, {rho}",
            )
        axes.set(xlabel="share of pairs in a sweep", ylabel="loss of the certified value")
        axes.legend(frameon=False)

    return Figure(
        f"Sampled sweeps (n = {n}, d = 16)",
        rows,
        plot,
        "Near rho = 1 few near neighbours carry a row, and samples serve worse.",
    )


METHODS = ("exact", "sampled", "sinkhorn", "pot", "ott")
LARGEST = {"exact": 16384, "sampled": 131072, "sinkhorn": 8192, "pot": 4096, "ott": 8192}


def scale(quick: bool) -> Figure:
    """Seconds and peak memory against n, each measurement in a process of its own."""
    sizes = (256, 512) if quick else (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    rows = []
    for method in ("exact", "sampled") if quick else METHODS:
        for n in (size for size in sizes if size <= LARGEST[method]):
            done = subprocess.run(
                [sys.executable, __file__, "measure", method, str(n)],
                check=True,
                capture_output=True,
                text=True,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    for method in dict.fromkeys(row["method"] for row in rows):
        kept = [row for row in rows if row["method"] == method]
        if len(kept) > 1:
            logs = np.log([[row["n"], row["seconds"]] for row in kept])
            slope = float(np.polyfit(*logs.T, 1)[0])
            rows[rows.index(kept[-1])] |= {"slope of time": slope}

    def plot(axes: Any) -> None:
        for method in dict.fromkeys(row["method"] for row in rows):
            kept = [row for row in rows if row["method"] == method]
            axes.loglog([r["n"] for r in kept], [r["seconds"] for r in kept], "o-", label=method)
        axes.set(xlabel="points on each side", ylabel="seconds, compilation left out")
        axes.legend(frameon=False)

    return Figure(
        "Time and memory against n (d = 16)",
        rows,
        plot,
        "R_rho at 1.1 to a bracket of 1e-3 (sampled: 256 pairs a row, exact passes for "
        "the bracket up to 4e8 pairs); Sinkhorn at 2 % of the mean distance; POT and "
        "OTT-JAX hold n x n numbers.",
    )


@app.command()
def measure(
    method: Annotated[str, typer.Argument(help=f"One of {', '.join(METHODS)}.")],
    n: Annotated[int, typer.Argument(help="Points on each side.")],
) -> None:
    """One time and one peak of memory, printed as JSON."""
    x, y = (z.astype(np.float32) for z in gauss(n, 16))
    run = {"exact": _exact, "sampled": _exact, "sinkhorn": _sinkhorn, "pot": _pot, "ott": _ott}
    solve = run[method](x, y, method)
    if method != "pot":  # which compiles nothing
        solve()
    began = time.perf_counter()
    value = solve()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps({"method": method, "n": n, "seconds": seconds, "peak MiB": peak, "value": value})
    )


def _exact(x: np.ndarray, y: np.ndarray, method: str) -> Callable[[], float]:
    from jaxinfer.theory import r_rho

    name = {"exact": "alternating"}.get(method, method)
    return lambda: r_rho(x, y, rho=1.1, method=name).value


def _sinkhorn(x: np.ndarray, y: np.ndarray, method: str) -> Callable[[], float]:
    import jax

    from jaxinfer.theory.transport import sinkhorn

    uniform = np.full(len(x), 1 / len(x), np.float32)
    solve = jax.jit(sinkhorn)
    return lambda: float(solve(x, y, uniform, uniform, _epsilon(x, y)).cost)


def _pot(x: np.ndarray, y: np.ndarray, method: str) -> Callable[[], float]:
    import ot

    uniform = np.full(len(x), 1 / len(x))
    cost = ot.dist(x.astype(float), y.astype(float), metric="euclidean")
    return lambda: float(ot.emd2(uniform, uniform, cost, numItermax=10**7))


def _ott(x: np.ndarray, y: np.ndarray, method: str) -> Callable[[], float]:
    import jax
    from ott.geometry import costs, pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    @jax.jit
    def solve(x: Any, y: Any) -> Any:
        geometry = pointcloud.PointCloud(x, y, cost_fn=costs.Euclidean(), epsilon=epsilon)
        return sinkhorn.Sinkhorn(max_iterations=2000)(
            linear_problem.LinearProblem(geometry)
        ).primal_cost

    epsilon = _epsilon(x, y)
    return lambda: float(solve(x, y))


def _epsilon(x: np.ndarray, y: np.ndarray) -> float:
    return 0.02 * float(np.linalg.norm(x - y[::-1], axis=1).mean())


FIGURES = {
    "values": values,
    "sweeps": sweeps,
    "informs": informs,
    "sampled": sampled,
    "scale": scale,
}


@app.command()
def figures(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: under three minutes.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="Some of values, sweeps, informs, sampled, scale.")
    ] = "",
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = RESULTS,
) -> None:
    """Every figure, or those named."""
    names = only.split(",") if only else list(FIGURES)
    unknown = sorted(set(names) - set(FIGURES))
    if unknown:
        raise typer.BadParameter(f"--only knows {', '.join(FIGURES)}; got {unknown[0]}")
    for name in names:
        found = FIGURES[name](quick)
        publish_records(
            f"r-rho-{name}",
            found.title,
            {"figure": name, "quick": quick},
            found.rows,
            found.plot,
            caveat=found.caveat,
            seed=SEED,
            folder=folder,
            command=f"python tools/reproduce/reproduce_r_rho.py figures --only {name}"
            + (" --quick" if quick else ""),
        )


if __name__ == "__main__":
    app()
