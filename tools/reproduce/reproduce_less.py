"""LESS's figure on a real model: how much of what H2O loses the low-rank state gives back.

    python tools/reproduce/reproduce_less.py [--model smollm2-135m --rows 12 --budgets 2,5,10]

Held-out prose is read through the cache token by token with the full cache, H2O at each budget (a
share of the row, half heavy hitters, half recent), H2O with the tokens that LESS's state costs in
memory ("Baseline+" of arXiv 2402.09398), and LESS. That memory is counted twice: with tokens of 32
bits, as they are on a CPU, and of 16 bits, as they are on a GPU, where the state, which stays in 32
bits, costs more tokens. The recovered share is the part of H2O's loss in nats that LESS removes;
its interval is a bootstrap over the rows. Writes `less-recovery`.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxinfer.cache.policy import Policy
from tools.reproduce.figures import bootstrap, held_out_rows, publish, read_rows

SOURCES = ["essays", "brown", "anarchism"]
DTYPES = {32: "float32", 16: "bfloat16"}  # of the tokens that are kept, by bits


COLOURS = {
    "H2O, equal memory at 32 bits": "#c3cad1",
    "H2O, equal memory at 16 bits": "#9aa5b1",
    "LESS": "#1b6ca8",
}


def recovered(lost: np.ndarray, gained: np.ndarray) -> float:
    """The part of what H2O loses against the full cache that another policy gains over H2O; nats
    by row."""
    return float(gained.sum() / lost.sum())


def main(
    model: Annotated[str, typer.Option(help="Model name or folder.")] = "smollm2-135m",
    feature_maps: Annotated[
        str, typer.Option("--feature-maps", "--kernels", help="Feature maps: a name or folder.")
    ] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens of every row.")] = 2048,
    rows: Annotated[int, typer.Option(help="Held-out documents, read side by side.")] = 12,
    budgets: Annotated[str, typer.Option(help="Percent of a row.")] = "2,5,10",
) -> None:
    """Writes LESS's figure."""
    import jaxinfer as ji
    from jaxinfer.eval.memory import bytes_per_token, policy_bytes
    from jaxinfer.eval.tables import Row

    lm = ji.load(model)
    text = held_out_rows(lm, rows, tokens, SOURCES)
    whole = bytes_per_token(lm, ji.full(), tokens)
    table, shares = [], {}

    def measure(label: str, policy: Policy) -> np.ndarray:
        """Mean nats per token of every row; a row of the table."""
        log_probs, _ = read_rows(lm, policy, text)
        nll = -log_probs
        needed = bytes_per_token(lm, policy, tokens)
        metrics = {"perplexity": math.exp(float(nll.mean())), "nll": float(nll.mean())}
        table.append(Row(label, policy.name, needed, needed / whole, metrics))
        typer.echo(f"{label}: perplexity {metrics['perplexity']:.3f}", err=True)
        return nll.mean(axis=1)

    reference = measure("full", ji.full())
    for percent in (float(x) for x in budgets.split(",")):
        half = max(int(percent / 200 * tokens), 1)
        base = ji.h2o(half, half)
        less = ji.less(base, feature_maps)
        bare = measure(f"{percent:g} %: H2O", base)
        found = {}
        for bits, dtype in DTYPES.items():
            per_token = policy_bytes(lm, ji.h2o(2, 2), tokens, dtype) / 4
            more = policy_bytes(lm, less, tokens, dtype) - policy_bytes(lm, base, tokens, dtype)
            extra = math.ceil(more / per_token)
            wider = ji.h2o(half + extra // 2, half + extra - extra // 2)
            found[f"H2O, equal memory at {bits} bits"] = measure(
                f"{percent:g} %: H2O + {extra}, equal memory at {bits} bits", wider
            )
        found["LESS"] = measure(f"{percent:g} %: LESS", less)
        shares[percent] = {}
        for row, (label, nll) in zip(table[-len(found) :], found.items(), strict=True):
            lost, gained = bare - reference, bare - nll
            row.metrics["recovered"] = recovered(lost, gained)
            row.metrics["low"], row.metrics["high"] = bootstrap(
                lambda picked, lost=lost, gained=gained: recovered(lost[picked], gained[picked]),
                rows,
            )
            shares[percent][label] = row.metrics["recovered"]

    def plot(axes) -> None:
        names, width = [f"{percent:g} %" for percent in shares], 0.27
        for index, (label, colour) in enumerate(COLOURS.items()):
            heights = [100 * found[label] for found in shares.values()]
            places = [i + (index - 1) * width for i in range(len(names))]
            bars = axes.bar(places, heights, width, label=label, color=colour)
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel(f"H2O budget, share of {tokens} tokens")
        axes.set_ylabel("recovered loss, %")
        axes.legend(frameon=False, fontsize=8)

    command = (
        f"python tools/reproduce/reproduce_less.py --model {model} --feature-maps {feature_maps} "
        f"--tokens {tokens} --rows {rows} --budgets {budgets}"
    )
    config = {"model": lm.name, "tokens": tokens, "rows": rows, "sources": SOURCES}
    title = f"LESS on {lm.name}: the share of H2O's loss that is recovered"
    publish("less-recovery", title, config, table, plot, seed=0, command=command)


if __name__ == "__main__":
    typer.run(main)
