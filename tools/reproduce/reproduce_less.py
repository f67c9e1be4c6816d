"""LESS's figure on a real model: how much of what H2O loses the low-rank state gives back.

    python tools/reproduce/reproduce_less.py [--model smollm2-135m --rows 8 --budgets 2,5,10]

Held-out prose is read through the cache token by token with the full cache, H2O at each budget (a
share of 2048 tokens, half heavy hitters, half recent), H2O with the tokens that LESS's state costs
in memory ("Baseline+" of arXiv 2402.09398), and LESS. The recovered share is the part of H2O's loss
in nats that LESS removes; its interval is a bootstrap over the rows. Writes `less-recovery`.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import bootstrap, held_out_rows, publish, read_rows

SOURCES = ["essays", "brown", "anarchism"]
CONTEXT = 2048  # what budgets are shares of


def main(
    model: Annotated[str, typer.Option(help="Model name or folder.")] = "smollm2-135m",
    feature_maps: Annotated[
        str, typer.Option("--feature-maps", "--kernels", help="Feature maps: a name or folder.")
    ] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens of every row.")] = 1024,
    rows: Annotated[int, typer.Option(help="Held-out documents, read side by side.")] = 8,
    budgets: Annotated[str, typer.Option(help="Percent of 2048 tokens.")] = "2,5,10",
) -> None:
    """Writes LESS's figure."""
    import jaxinfer as ji
    from jaxinfer.eval.memory import bytes_per_token, policy_bytes
    from jaxinfer.eval.tables import Row

    lm = ji.load(model)
    text = held_out_rows(lm, rows, tokens, SOURCES)
    whole = bytes_per_token(lm, ji.full(), tokens)
    table, shares = [], {}

    def measure(label: str, policy) -> "object":
        # Rows of different policies are compared token by token, after the first eviction.
        log_probs, _ = read_rows(lm, policy, text)
        nll = -log_probs
        needed = bytes_per_token(lm, policy, tokens)
        metrics = {"perplexity": math.exp(float(nll.mean())), "nll": float(nll.mean())}
        table.append(Row(label, policy.name, needed, needed / whole, metrics))
        typer.echo(f"{label}: perplexity {metrics['perplexity']:.3f}", err=True)
        return nll.mean(axis=1)

    reference = measure("full", ji.full())
    for percent in (float(x) for x in budgets.split(",")):
        half = max(int(percent / 200 * CONTEXT), 1)
        base = ji.h2o(half, half)
        less = ji.less(base, feature_maps)
        per_token = policy_bytes(lm, ji.h2o(2, 2), tokens) / 4
        more = policy_bytes(lm, less, tokens) - policy_bytes(lm, base, tokens)
        extra = math.ceil(more / per_token)
        bare = measure(f"{percent:g} %: H2O", base)
        wider = ji.h2o(half + extra // 2, half + extra - extra // 2)
        wide = measure(f"{percent:g} %: H2O + {extra}", wider)
        ours = measure(f"{percent:g} %: LESS", less)

        def share(of, picked=slice(None), bare=bare):
            lost = (bare[picked] - reference[picked]).sum()
            return float((bare[picked] - of[picked]).sum() / lost)

        for row, found in ((-2, wide), (-1, ours)):
            interval = bootstrap(lambda picked, found=found: share(found, picked), rows)
            table[row].metrics["recovered"] = share(found)
            table[row].metrics["low"], table[row].metrics["high"] = interval
        shares[percent] = (share(wide), share(ours), table[-1].metrics)

    def plot(axes) -> None:
        names, width = [f"{percent:g} %" for percent in shares], 0.35
        for offset, index, label, colour in (
            (-width / 2, 0, "H2O of equal memory", "#9aa5b1"),
            (width / 2, 1, "LESS", "#1b6ca8"),
        ):
            heights = [100 * found[index] for found in shares.values()]
            places = [i + offset for i in range(len(names))]
            bars = axes.bar(places, heights, width, label=label, color=colour)
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("H2O budget, share of 2048 tokens")
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
