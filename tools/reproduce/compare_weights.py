"""What weights of 8 and 4 bits cost and gain on this machine: bytes, perplexity, and the time of
decode steps that read 1 to 16 tokens, interleaved.

    python tools/reproduce/compare_weights.py --model smollm2-135m
"""

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import held_out_rows, publish, read_rows

SOURCES = ["essays", "brown", "anarchism", "pydoc", "kjv"]
COUNTS = (1, 2, 4, 8, 16)
CONTEXT = 512


def reading(lm: Any, count: int):
    """A function that reads `count` tokens behind an empty cache, in seconds."""
    import jax
    import jax.numpy as jnp

    import jaxinfer as ji

    cache = lm.engine.new_cache(ji.full(), 1, CONTEXT)
    program = jax.jit(
        lambda params, tokens, cache: ji.forward(lm.config, params, tokens, cache).logits
    )
    tokens = jnp.arange(count, dtype=jnp.int32)[None]

    def once() -> float:
        start = time.perf_counter()
        program(lm.params, tokens, cache).block_until_ready()
        return time.perf_counter() - start

    return once


def main(
    model: Annotated[str, typer.Option(help="Model.")] = "smollm2-135m",
    rows: Annotated[int, typer.Option(help="Held-out documents.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 384,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 15,
) -> None:
    """Perplexity, bytes and step times of one model in float32, int8 and int4."""
    import jaxinfer as ji
    from jaxinfer.cache.base import bytes_of
    from jaxinfer.eval.tables import Row

    models = {
        name: ji.load(model, dtype="float32", weights=None if name == "float32" else name)
        for name in ("float32", "int8", "int4")
    }
    table = []
    whole = bytes_of(models["float32"].params)
    for name, lm in models.items():
        text = held_out_rows(lm, rows, tokens, SOURCES)
        log_probs, _ = read_rows(lm, ji.full(), text)
        metrics: dict[str, Any] = {"perplexity": math.exp(-float(log_probs.mean()))}
        metrics["megabytes"] = bytes_of(lm.params) / 1e6
        table.append(Row(name, "full", 0, bytes_of(lm.params) / whole, metrics))
        typer.echo(f"{name}: perplexity {metrics['perplexity']:.3f}", err=True)
    for count in COUNTS:
        programs = {name: reading(lm, count) for name, lm in models.items()}
        times: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(rounds + 1):  # the first one compiles
            for name, once in programs.items():
                seconds = once()
                if number:
                    times[name].append(seconds)
        for row in table:
            row.metrics[f"ms_{count}"] = 1e3 * statistics.median(times[row.label])
        typer.echo(
            f"{count} tokens: {[round(r.metrics[f'ms_{count}'], 2) for r in table]}", err=True
        )

    def plot(axes) -> None:
        for row in table:
            axes.plot(COUNTS, [row.metrics[f"ms_{n}"] for n in COUNTS], "-o", label=row.label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axes.set_xlabel("tokens read in one step")
        axes.set_ylabel("milliseconds")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)

    command = f"python tools/reproduce/compare_weights.py --model {model} --rows {rows} "
    command += f"--tokens {tokens} --rounds {rounds}"
    config = {"model": model, "rows": rows, "tokens": tokens, "sources": SOURCES, "rounds": rounds}
    title = f"{model} with weights of 32, 8 and 4 bits"
    publish(f"weights-{model}", title, config, table, plot, seed=0, command=command)


if __name__ == "__main__":
    typer.run(main)
