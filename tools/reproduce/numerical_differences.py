"""How far the same text may differ between batches and chunk sizes, which are other programs.

    python tools/reproduce/numerical_differences.py [--model tiny-llama --tokens 256]

Held-out documents are read through the full cache in one batch and in chunks of 512 tokens, and
again alone and in chunks of 1, 16 and 64, with floating weights and with 8 bits: the differences of
the log-probabilities of the same tokens, in nats. Sums in another order differ in their last bits;
in 8 bits such a bit can move a rounded activation to the next code, whose step is far larger.
Writes `numerical-differences-MODEL`.
"""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import held_out_rows, publish, read_rows

SOURCES = ["essays", "brown"]
ROWS = 8
CHUNKS = (1, 16, 64)


def main(
    model: Annotated[str, typer.Option(help="Model name or folder.")] = "tiny-llama",
    tokens: Annotated[int, typer.Option(help="Tokens of every document.")] = 256,
) -> None:
    """Writes the table of differences."""
    import jaxinfer as ji
    from jaxinfer.eval.tables import Row

    rows = []
    for weights in (None, "int8"):
        lm = ji.load(model, weights=weights)
        text = held_out_rows(lm, ROWS, tokens, SOURCES)
        together, _ = read_rows(lm, ji.full(), text)
        found = {"alone": np.concatenate([read_rows(lm, ji.full(), row[None])[0] for row in text])}
        for chunk in CHUNKS:
            found[f"chunks of {chunk}"] = read_rows(lm, ji.full(), text, chunk)[0]
        for label, log_probs in found.items():
            apart = np.abs(log_probs - together)
            metrics = {
                "largest": float(apart.max()),
                "mean": float(apart.mean()),
                "perplexity_ratio": float(np.exp(together.mean() - log_probs.mean())),
                "scored": apart.size,
            }
            rows.append(Row(f"{weights or 'float32'}, {label}", "full", 0.0, 1.0, metrics))
            typer.echo(f"{rows[-1].label}: {metrics['largest']:.2e} nats", err=True)

    def plot(axes) -> None:
        labels = [row.label for row in rows]
        bars = axes.barh(labels[::-1], [row.metrics["largest"] for row in rows][::-1])
        axes.bar_label(bars, fmt="%.1e", padding=3, fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("largest difference of a token's log-probability, nats")

    config = {"model": lm.name, "rows": ROWS, "tokens": tokens, "sources": SOURCES}
    title = f"Batches and chunks of {lm.name}: the same text by other programs"
    command = f"python tools/reproduce/numerical_differences.py --model {model} --tokens {tokens}"
    name = f"numerical-differences-{lm.name}"
    publish(name, title, config, rows, plot, seed=0, command=command)


if __name__ == "__main__":
    typer.run(main)
