"""KIVI's figures on a real model: quality against bits and grouping, memory against length.

    python tools/reproduce/reproduce_kivi.py [--model smollm2-135m --tokens 1024 --rows 16]

Perplexity of held-out text read through the cache token by token, context committed, under the
choices of arXiv 2402.02750, table 3: keys grouped per channel and values per token, and the other
three ways, at two bits; then KIVI itself at 2, 4 and 8 bits, both halves per token behind a
Hadamard rotation (QuaRot, arXiv 2404.00456), and a plain window of KIVI's bytes. Only tokens behind
the longest residual are scored, where every row has quantized tokens to read; intervals of the
increase over the full cache are bootstraps over the documents. Writes `kivi-quality` and
`kivi-memory`.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import bootstrap, held_out_rows, publish, read_rows

SOURCES = ["essays", "brown"]
RESIDUAL = 128  # the longest; tokens before it read nothing that is quantized
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]


def quality_policies() -> dict:
    """By label, in the order in which the paper reports them."""
    from jaxinfer import full, kivi

    grouped = {
        f"2 bit, K {keys}, V {values}": kivi(
            # a group of values of one channel spans tokens, which must leave the tail together
            2,
            residual=32,
            value_flush="block",
            key_grouping=keys,
            value_grouping=values,
        )
        for keys, values in (
            ("token", "channel"),
            ("channel", "channel"),
            ("token", "token"),
            ("channel", "token"),
        )
    }
    return {
        "full": full(),
        **grouped,
        # as "K channel, V token" above, but every value leaves the tail alone, as in the paper
        "KIVI-2, R 32": kivi(2, residual=32),
        "KIVI-2, R 128": kivi(2),
        "KIVI-4, R 32": kivi(4, residual=32),
        "KIVI-4, R 128": kivi(4),
        "KIVI-8, R 128": kivi(8),
        **{
            f"Hadamard-{bits}, R {residual}": kivi(
                bits, residual=residual, key_grouping="token", rotation="hadamard"
            )
            for bits, residual in ((2, 32), (2, RESIDUAL), (4, 32))
        },
    }


def quality(lm, tokens, seed: int, command: str) -> None:
    from jaxinfer.eval.memory import bytes_per_token, equal_memory
    from jaxinfer.eval.tables import Row

    policies = quality_policies()
    length = tokens.shape[1]
    for residual in (32, RESIDUAL):
        label = f"KIVI-2, R {residual}"
        policies[f"4 sinks and a window of the bytes of {label}"] = equal_memory(
            lm, policies[label], length
        )
    whole, rows, full_nll = bytes_per_token(lm, policies["full"], length), [], None
    for label, policy in policies.items():
        log_probs, _ = read_rows(lm, policy, tokens)
        # the log-probability at i is that of token i + 1, read with i + 1 tokens in the cache
        by_document = -log_probs[:, RESIDUAL:].mean(axis=1, dtype=np.float64)
        full_nll = by_document if full_nll is None else full_nll
        nll, more = float(by_document.mean()), by_document - full_nll
        low, high = bootstrap(lambda picked, more=more: more[picked].mean(), len(tokens))
        needed = bytes_per_token(lm, policy, length)
        metrics = {
            "perplexity": math.exp(nll),
            "nll": nll,
            "scored": log_probs[:, RESIDUAL:].size,
            "over_full": math.exp(more.mean()),
            "low": math.exp(low),
            "high": math.exp(high),
        }
        rows.append(Row(label, policy.name, needed, needed / whole, metrics))
        typer.echo(f"{label}: perplexity {metrics['perplexity']:.3f}", err=True)

    def plot(axes) -> None:
        labels = [row.label for row in rows]
        values = [row.metrics["perplexity"] for row in rows]
        colours = ["#1b6ca8" if label.startswith("KIVI") else "#9aa5b1" for label in labels]
        bars = axes.barh(labels[::-1], values[::-1], color=colours[::-1])
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axes.axvline(values[0], color="#d9822b", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("perplexity (log scale)")

    config = {
        "model": lm.name,
        "rows": len(tokens),
        "tokens": length,
        "scored_from": RESIDUAL + 1,
        "sources": SOURCES,
    }
    title = f"KIVI on {lm.name}: perplexity by bits and grouping"
    publish("kivi-quality", title, config, rows, plot, seed=seed, command=command)


def memory(lm, seed: int, command: str) -> None:
    """Bytes of one row by formula, which tests compare with what is allocated; bfloat16."""
    from jaxinfer import full, h2o, kivi, streaming
    from jaxinfer.eval.memory import policy_bytes
    from jaxinfer.eval.tables import Row

    policies = {
        "full": full(),
        "KIVI-4": kivi(4),
        "KIVI-2": kivi(2),
        "h2o 20 %": h2o(0.1, 0.1),
        "streaming 4+1020": streaming(4, 1020),
    }
    sizes = {
        label: [policy_bytes(lm, policy, length, "bfloat16") for length in LENGTHS]
        for label, policy in policies.items()
    }
    at = LENGTHS.index(4096)
    budget = 1 << 30
    rows = [
        Row(
            label,
            policies[label].name,
            found[at] / 4096,
            found[at] / sizes["full"][at],
            {
                "mb_at_4096": found[at] / 1e6,
                "smaller_at_4096": sizes["full"][at] / found[at],
                "rows_of_4096_in_1_gib": budget // found[at],
                "smaller_at_32768": sizes["full"][-1] / found[-1],
            },
        )
        for label, found in sizes.items()
    ]

    def plot(axes) -> None:
        for label, found in sizes.items():
            axes.plot(LENGTHS, [size / 1e6 for size in found], "-o", markersize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens in one row")
        axes.set_ylabel("cache, MB, bfloat16")
        axes.legend(frameon=False, fontsize=8)

    config = {"model": lm.name, "lengths": LENGTHS, "bytes": sizes, "dtype": "bfloat16"}
    title = f"Cache of {lm.name} against length"
    publish("kivi-memory", title, config, rows, plot, seed=seed, command=command)


def main(
    model: Annotated[str, typer.Option(help="Model name or folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens of every row.")] = 1024,
    rows: Annotated[int, typer.Option(help="Held-out documents, read side by side.")] = 16,
) -> None:
    """Writes KIVI's figures."""
    import jaxinfer as ji

    command = (
        f"python tools/reproduce/reproduce_kivi.py --model {model} --tokens {tokens} --rows {rows}"
    )
    lm = ji.load(model)
    memory(lm, 0, command)
    quality(lm, held_out_rows(lm, rows, tokens, SOURCES), 0, command)


if __name__ == "__main__":
    typer.run(main)
