"""LTE (arXiv 2402.06126) beside what it is compared with, all trained equally long, on several
seeds.

    python tools/reproduce/reproduce_lte.py tiny-opt --run-dir RUN

For every seed the model's feed-forward blocks are trained densely, with LTE's routers steered to
each target, and behind random routers with as many blocks as LTE then uses, for the same number of
updates on the same windows. MoEfication, CATS and TEAL are applied to that seed's dense training,
calibrated on training windows. MoEfication gets as many blocks as LTE uses, rounded up; CATS the
same share of the neurons, for which it multiplies more, as it computes the gate of every neuron;
TEAL the same share of the products of the layers. A killed command goes on from RUN.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import RESULTS, publish_records

HELD_OUT_SEED = 1
METHODS = "LTE", "random router", "MoEfication", "MoEfication's oracle", "CATS", "TEAL"
CAVEAT = (
    "Perplexity on held-out windows, mean and range over the seeds, and over the dense model that "
    "was trained as long. `neurons` is the share of the neurons that a token uses, `products` that "
    "of the products of all layers with what choosing costs; TEAL leaves out inputs of every "
    "weight. MoEfication's oracle knows every activation before it chooses: it is a bound. In a "
    "block without a gate CATS computes every hidden value and saves products of the second "
    "matrix only."
)


class Study:
    """A model, its windows, and the trainings of one command."""

    def __init__(self, model: str, run: Path, sizes: dict[str, int]):
        import jaxinfer as ji
        from jaxinfer.train.windows import text_windows

        self.lm, self.run, self.sizes = ji.load(model, dtype="float32"), run, sizes
        context = sizes["context"]
        self.windows = text_windows(self.lm.encode, sizes["windows"], context)
        self.held_out = text_windows(
            self.lm.encode, sizes["held_out"], context, seed=HELD_OUT_SEED, split="heldout"
        )

    def trained(self, name: str, seed: int, target: float | None = None) -> dict[str, Any]:
        """A training's parameters, its perplexity and what it uses."""
        from jaxinfer.train.lte.recipe import preset
        from jaxinfer.train.lte.training import train_lte

        recipe = preset(
            name, target_density=target, block_size=self.sizes["block_size"], trainable="mlp",
            steps=self.sizes["steps"], adapt_steps=self.sizes["steps"], batch=self.sizes["batch"],
            seed=seed,
        )  # fmt: skip
        folder = self.run / f"{name}-{'' if target is None else f'{target:.4f}-'}{seed}"
        found = train_lte(self.lm, self.windows, self.held_out, recipe, folder)
        return self.judged(found.params())

    def judged(self, params: Any) -> dict[str, Any]:
        from jaxinfer.train.lte.measure import measure

        perplexity = measure(self.lm.config, params, self.held_out).perplexity
        return {"params": params, "perplexity": perplexity} | self.used(params)

    def used(self, params: Any) -> dict[str, float]:
        """Shares of the neurons, and of the dense layers' products."""
        import jax.numpy as jnp

        from jaxinfer.sparsity.accounting import measure, shares

        found = measure(self.lm.config, params, jnp.asarray(self.held_out[:4, :-1]))
        of_dense = shares(self.lm.params, params, found)
        return {"neurons": float(np.mean(found.blocks)), "products": of_dense.layer_products}

    def seed_rows(self, seed: int, targets: Sequence[float]) -> list[dict[str, Any]]:
        """What every method reaches on one seed."""
        from jaxinfer.sparsity import baselines
        from jaxinfer.sparsity.calibration import Calibration

        dense, size = self.trained("dense", seed), self.sizes["block_size"]
        found = [{"method": "dense", "target": 1.0} | dense]
        calibration = Calibration(self.lm.config, dense["params"], self.windows[:128, :-1])
        blocks = self.lm.config.intermediate_size // size
        for target in targets:
            lte = self.trained("ste", seed, target)
            neurons = lte["neurons"]
            share = float(np.ceil(neurons * blocks) / blocks)
            made = {
                "MoEfication": (baselines.moefication_router, share),
                "MoEfication's oracle": (baselines.moefication_oracle, share),
                "CATS": (baselines.cats, neurons),
                "TEAL": (baselines.teal, min(lte["products"], 1.0)),
            }
            rows = {"LTE": lte, "random router": self.trained("random", seed, share)}
            rows |= {
                name: self.judged(method(calibration, at, size))
                for name, (method, at) in made.items()
            }
            found += [{"method": name, "target": target} | rows[name] for name in METHODS]
        for row in found:
            row["relative"] = row["perplexity"] / dense["perplexity"]
            del row["params"]
        return found


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method and target, over the seeds."""
    found = []
    for method, target in dict.fromkeys((row["method"], row["target"]) for row in rows):
        same = [row for row in rows if (row["method"], row["target"]) == (method, target)]
        of = functools.partial(_column, same)
        found.append({
            "method": method, "target": target, "neurons": of("neurons").mean(),
            "products": of("products").mean(), "perplexity": of("perplexity").mean(),
            "lowest": of("perplexity").min(), "highest": of("perplexity").max(),
            "relative": of("relative").mean(), "relative_highest": of("relative").max(),
            "seeds": len(same),
        })  # fmt: skip
    return found


def _column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows])


def main(
    model: Annotated[str, typer.Argument(help="Model name or folder.")],
    run_dir: Annotated[Path, typer.Option(help="Working folder; a killed command goes on.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 3,
    targets: Annotated[str, typer.Option(help="Densities, separated by commas.")] = "0.5,0.25",
    block_size: Annotated[int, typer.Option(min=1, help="Neurons of a block.")] = 32,
    windows: Annotated[int, typer.Option(min=2, help="Windows of text.")] = 4096,
    context: Annotated[int, typer.Option(min=16, help="Tokens per window.")] = 256,
    held_out: Annotated[int, typer.Option(min=4, help="Windows to measure on.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="Updates of each of two stages.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Windows per update.")] = 4,
    folder: Annotated[Path, typer.Option(help="Where the figure is written.")] = RESULTS,
) -> None:
    """Trains and compares; writes the record, the table and the plot."""
    sizes = {"block_size": block_size, "windows": windows, "context": context,
             "held_out": held_out, "steps": steps, "batch": batch}  # fmt: skip
    study, rows = Study(model, run_dir, sizes), []
    for seed in range(seeds):
        rows += study.seed_rows(seed, [float(x) for x in targets.split(",")])
        print(f"seed {seed}: dense {rows[-1]['perplexity'] / rows[-1]['relative']:.3f}",
              file=sys.stderr)  # fmt: skip
    table, name = summary(rows), Path(model).name

    def plot(axes) -> None:
        for method in METHODS:
            points = sorted(
                (row["products"], row["relative"], row["relative_highest"])
                for row in table
                if row["method"] == method
            )
            x, mean, high = zip(*points, strict=True)
            axes.plot(x, mean, marker="o", ms=4, label=method)
            axes.vlines(x, mean, high, lw=1)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xlabel("share of the dense products of the layers")
        axes.set_ylabel("perplexity over dense, trained as long")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)

    command = f"python tools/reproduce/reproduce_lte.py {model} --run-dir RUN --seeds {seeds} "
    command += f"--targets {targets} " + " ".join(
        f"--{key.replace('_', '-')} {value}" for key, value in sizes.items()
    )
    publish_records(
        f"lte-seeds-{name}", f"LTE of {name} beside others that were trained as long",
        {"model": name, "targets": targets, "seeds": seeds} | sizes, table, plot, caveat=CAVEAT,
        seed=0, command=command, folder=folder,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
