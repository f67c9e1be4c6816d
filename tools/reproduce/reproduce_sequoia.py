"""Sequoia's figures on a real pair of models (arXiv 2402.12374, figures 1, 3 and 4, table 1).

    python tools/reproduce/reproduce_sequoia.py methods  # tokens per step: trees and verifiers
    python tools/reproduce/reproduce_sequoia.py sizes  # tokens per step by the size of the tree
    python tools/reproduce/reproduce_sequoia.py speed  # the tuned tree: predicted and measured time

The target continues the beginnings of held-out documents. Acceptance is measured on other documents
than the ones that are then continued. Intervals are 95 % bootstraps over the documents.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import bootstrap, held_out_rows, publish

SOURCES = ["essays", "brown", "anarchism", "pydoc", "kjv"]
PROMPT = 32
KNOWN = 48  # documents that acceptance is measured on
TEMPERATURES = (0.0, 0.6, 1.0)
SETTINGS = ((0.0, 1.0), (0.6, 1.0), (0.6, 0.9), (1.0, 1.0), (1.0, 0.9))  # temperature, top-p
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

TargetOption = Annotated[str, typer.Option(help="Target model.")]
DraftOption = Annotated[str, typer.Option(help="Draft model, prompt-lookup or exit:N.")]
RowsOption = Annotated[int, typer.Option(help="Held-out documents that are continued.")]
TokensOption = Annotated[int, typer.Option(help="New tokens of each.")]


class Pair:
    """Two models, the documents to measure acceptance on, and those to continue."""

    def __init__(self, target: str, draft: str, rows: int, tokens: int, weights: str | None = None):
        import jaxinfer as ji
        from jaxinfer.cli.models import open_draft

        self.target = ji.load(target, dtype="float32", weights=weights)
        self.draft: Any = open_draft(self.target, draft, "float32", weights)
        self.rows, self.tokens = rows, tokens
        prompts = held_out_rows(self.target, KNOWN + rows, PROMPT, SOURCES).tolist()
        self.known, self.prompts = prompts[:KNOWN], prompts[KNOWN:]
        self.names = {"target": target, "draft": draft, "rows": rows, "tokens": tokens}

    def acceptance(self, sampler):
        from jaxinfer.speculative.acceptance_rates import measure_acceptance, online_acceptance
        from jaxinfer.speculative.topology import Topology

        if isinstance(self.draft, str):
            return online_acceptance(self.target, self.known, sampler, Topology.chain(8))
        return measure_acceptance(
            self.target, self.draft, self.known, sampler, new_tokens=self.tokens
        )

    def tokens_per_step(
        self, topology, sampler, method: str = "sequoia", samples: int = 1
    ) -> np.ndarray:
        """[rows], means over `samples` continuations of each document, all in one batch."""
        import jaxinfer as ji
        from jaxinfer.decode.options import Options
        from jaxinfer.decode.run import Run

        plan = ji.speculate(self.target, self.draft, topology, method=method)
        run = Run(self.target, self.prompts * samples, Options(
            sampler=sampler, max_new_tokens=self.tokens, ignore_eos=True, draft=plan,
            seed=list(range(self.rows * samples)),
        ))  # fmt: skip
        run.finish()
        counts = np.asarray(run.state.speculation.emitted)
        per_run = (counts * np.arange(counts.shape[1])).sum(axis=1) / counts.sum(axis=1)
        return per_run.reshape(samples, self.rows).mean(axis=0)


def row_of(label: str, per_row: np.ndarray, **more: float):
    from jaxinfer.eval.tables import Row

    low, high = bootstrap(lambda picked: float(per_row[picked].mean()), len(per_row))
    metrics = {"tokens_per_step": float(per_row.mean()), "low": low, "high": high} | more
    print(f"{label}: {metrics['tokens_per_step']:.3f}", file=sys.stderr)
    return Row(label, "full", 0, 1.0, metrics)


@app.command()
def methods(
    target: TargetOption = "tiny-llama",
    draft: DraftOption = "tiny-draft",
    rows: RowsOption = 64,
    tokens: TokensOption = 96,
    nodes: Annotated[int, typer.Option(help="Nodes of every tree.")] = 33,
    levels: Annotated[int, typer.Option(help="Levels of the optimal tree, at most.")] = 8,
    samples: Annotated[int, typer.Option(help="Continuations of a text above T = 0.")] = 2,
) -> None:
    """Tokens per step of Sequoia, k chains, SpecInfer and top-k over temperature and top-p, and how
    far Sequoia is ahead of each on the same documents."""
    import jaxinfer as ji

    pair, table = Pair(target, draft, rows, tokens), []
    chains = ji.Topology.k_chains(4, (nodes - 1) // 4)
    for temperature, top_p in SETTINGS:
        sampler = ji.Sampler(temperature=temperature, top_p=top_p)
        setting = f"T={temperature}" + (f", top-p {top_p}" if top_p < 1 else "")
        found, ours = pair.acceptance(sampler), np.zeros(rows)
        best = ji.Topology.optimal(found, nodes, levels)
        for name, tree, method in (
            ("Sequoia", best, "sequoia"),
            ("k chains", chains, "sequoia"),
            ("SpecInfer", chains, "specinfer"),
            ("top-k", best, "top-k"),
            ("chain", ji.Topology.chain(levels), "sequoia"),
        ):
            expected = ji.expected_tokens(tree, found)
            measured = pair.tokens_per_step(tree, sampler, method, samples if temperature else 1)
            label = f"{setting}: {name}"
            if name == "Sequoia":
                ours = measured
                table.append(row_of(label, measured, expected=expected))
                continue
            ahead = ours - measured  # on the same documents
            low, high = bootstrap(lambda picked, ahead=ahead: float(ahead[picked].mean()), rows)
            more = {"sequoia_ahead": float(ahead.mean()), "ahead_low": low, "ahead_high": high}
            table.append(row_of(label, measured, expected=expected, **more))

    def plot(axes) -> None:
        labels = [row.label.split(": ") for row in table]
        settings, names = (list(dict.fromkeys(x)) for x in zip(*labels, strict=True))
        for i, name in enumerate(names):
            picked = [row.metrics for row in table if row.label.endswith(f": {name}")]
            means = np.array([row["tokens_per_step"] for row in picked])
            error = [
                means - [row["low"] for row in picked], [row["high"] for row in picked] - means
            ]  # fmt: skip
            places = np.arange(len(settings)) + (i - 2) * 0.16
            axes.bar(places, means, 0.15, yerr=error, label=name, error_kw={"lw": 0.8})
        axes.set_xticks(range(len(settings)), [x.replace(", ", "\n") for x in settings])
        axes.set_ylabel("tokens per step")
        axes.legend(frameon=False, fontsize=8, ncols=3)

    command = (
        f"python tools/reproduce/reproduce_sequoia.py methods --target {target} --draft {draft} "
    )
    command += f"--rows {rows} --tokens {tokens} --nodes {nodes} --levels {levels} "
    command += f"--samples {samples}"
    title = f"Tokens per step with {nodes} nodes, {pair.target.name} + {draft}"
    publish("sequoia-methods", title, pair.names, table, plot, seed=0, command=command)


@app.command()
def sizes(
    target: TargetOption = "tiny-llama",
    draft: DraftOption = "tiny-draft",
    rows: RowsOption = 24,
    tokens: TokensOption = 96,
    temperature: Annotated[float, typer.Option(help="Of the sampler.")] = 0.6,
    most: Annotated[int, typer.Option(help="Nodes of the largest tree.")] = 64,
    levels: Annotated[int, typer.Option(help="Levels, at most.")] = 10,
) -> None:
    """Tokens per step against tree size: optimal trees grow where chains saturate."""
    import jaxinfer as ji

    pair, table = Pair(target, draft, rows, tokens), []
    sampler = ji.Sampler(temperature=temperature)
    found = pair.acceptance(sampler)
    numbers = [2**i for i in range(1, most.bit_length())]
    for nodes in numbers:
        trees = {
            "Sequoia": ji.Topology.optimal(found, nodes, levels),
            "chain": ji.Topology.chain(min(nodes, levels)),
        }
        if nodes > 4:
            trees["4 chains"] = ji.Topology.k_chains(4, min((nodes - 1) // 4, levels - 1))
        for name, tree in trees.items():
            expected = ji.expected_tokens(tree, found)
            measured = pair.tokens_per_step(tree, sampler)
            table.append(row_of(f"{name}, {nodes}", measured, expected=expected, nodes=tree.nodes))

    def plot(axes) -> None:
        for name in ("Sequoia", "4 chains", "chain"):
            picked = [row for row in table if row.label.startswith(name + ",")]
            x = [int(row.label.split(", ")[1]) for row in picked]
            line = axes.plot(
                x, [row.metrics["tokens_per_step"] for row in picked], marker="o", label=name
            )
            expected = [row.metrics["expected"] for row in picked]
            axes.plot(x, expected, ls=":", color=line[0].get_color())
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(n) for n in numbers])
        axes.set_xlabel("nodes (dotted: expected)")
        axes.set_ylabel("tokens per step")
        axes.legend(frameon=False, fontsize=8)

    command = (
        f"python tools/reproduce/reproduce_sequoia.py sizes --target {target} --draft {draft} "
    )
    command += f"--rows {rows} --tokens {tokens} --temperature {temperature} --most {most} "
    command += f"--levels {levels}"
    title = f"Tokens per step against tree size, {pair.target.name} + {draft}, T = {temperature}"
    publish("sequoia-sizes", title, pair.names, table, plot, seed=0, command=command)


def timed(
    pair: Pair, contenders: dict[str, Any], sampler, rounds: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Seconds of decoding all prompts, [rounds] per contender (a model and its plan), and [rows],
    the tokens per step of the one called "tuned"."""
    times, per_row = {name: np.zeros(rounds + 1) for name in contenders}, np.ones(pair.rows)
    for round_number in range(rounds + 1):  # the first one compiles
        for i, prompt in enumerate(pair.prompts):
            for name, (lm, plan) in contenders.items():  # side by side: a machine's clock changes
                (out,) = lm.generate(
                    [prompt], sampler=sampler, max_new_tokens=pair.tokens, ignore_eos=True,
                    seed=i, draft=plan,
                )  # fmt: skip
                times[name][round_number] += out.stats.decode_s
                if name == "tuned":
                    per_row[i] = out.stats.tokens_per_step
    return {name: seconds[1:] for name, seconds in times.items()}, per_row


@app.command()
def speed(
    target: TargetOption = "tiny-llama",
    draft: DraftOption = "tiny-draft",
    rows: RowsOption = 12,
    tokens: TokensOption = 128,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    weights: Annotated[str | None, typer.Option(help="int8 or int4, of both models.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Of the sampler.")] = None,
) -> None:
    """The tree that tuning chooses against the machine's best plain decoding, one text at a time.

    Plain decoding runs with float32 and with int8 weights; the faster one of each round is what
    speculation has to beat.
    """
    import jaxinfer as ji
    from jaxinfer.speculative.tuning import tune

    pair, table = Pair(target, draft, rows, tokens, weights), []
    model = None if isinstance(pair.draft, str) else pair.draft
    plain = {
        kind or "float32": pair.target
        if kind == weights
        else ji.load(target, dtype="float32", weights=kind)
        for kind in dict.fromkeys((None, "int8", weights))
    }
    temperatures = tuple(temperature or TEMPERATURES)
    for degree in temperatures:
        sampler = ji.Sampler(temperature=degree)
        tuned = tune(pair.target, model, sampler, prompts=pair.known, new_tokens=tokens, fresh=True)
        choice = tuned.choice()
        tree = choice.topology
        contenders: dict[str, Any] = {kind: (lm, None) for kind, lm in plain.items()}
        if tree.nodes > 1:
            contenders["tuned"] = pair.target, ji.speculate(pair.target, pair.draft, tree)
        times, per_row = timed(pair, contenders, sampler, rounds)
        same = times[weights or "float32"]
        best = np.min([times[kind] for kind in plain], axis=0)
        ratios = best / times.get("tuned", same)
        table.append(
            row_of(
                f"T={degree}: {tree}",
                per_row,
                expected=choice.expected,
                speedup=float(np.median(ratios)),
                slowest=float(ratios.min()),
                fastest=float(ratios.max()),
                over_same_weights=float(np.median(same / times.get("tuned", same))),
                predicted=choice.speedup,
                nodes=tree.nodes,
                **{
                    f"plain_{kind}_tokens_per_s": rows * tokens / float(np.median(times[kind]))
                    for kind in plain
                },
                draft_ms=tuned.draft_ms,
                **{f"step_ms_{n}": ms for n, ms in tuned.verify_ms.items()},
            )  # fmt: skip
        )

    def plot(axes) -> None:
        places = np.arange(len(table))
        for offset, key, label in (
            (-0.27, "predicted", "predicted over the same weights"),
            (0.0, "over_same_weights", "measured over the same weights"),
            (0.27, "speedup", "measured over the best plain decoding"),
        ):
            bars = axes.bar(places + offset, [r.metrics[key] for r in table], 0.26, label=label)
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xticks(places, [f"T = {t}\n{r.metrics['nodes']} nodes" for t, r in
                                 zip(temperatures, table, strict=True)])  # fmt: skip
        axes.set_ylabel("speed against plain decoding")
        axes.legend(frameon=False, fontsize=8)

    command = (
        f"python tools/reproduce/reproduce_sequoia.py speed --target {target} --draft {draft} "
    )
    command += f"--rows {rows} --tokens {tokens} --rounds {rounds}"
    title = f"Speculation with the tuned tree, {pair.target.name} + {draft}"
    name = f"sequoia-speed-{pair.target.name}"
    if temperature:
        command += "".join(f" --temperature {degree}" for degree in temperatures)
    if weights is not None:
        command += f" --weights {weights}"
        title, name = f"{title}, {weights} weights", f"{name}-{weights}"
    config = pair.names | {"weights": weights, "rounds": rounds}
    publish(name, title, config, table, plot, seed=0, command=command)


if __name__ == "__main__":
    app()
