"""What `jaxinfer diagnose` is worth: held-out perplexity of the policies per layer that each score
chooses, beside uniform ones of the same bytes, a funnel over layers, keys before values, and random
choices; and how each score ranks the layers.

    python tools/reproduce/reproduce_diagnose.py --run-dir DIR [--model smollm2-135m] [--quick]

Some held-out documents are for choosing, others for judging. A budget is that of one policy in
every layer, so that "uniform" has the same bytes. Texts are read layer by layer, each through its
own cache with errors that add up, which gives what `LM.score` gives, with one program for each
policy instead of one for each choice. Intervals are 95 % of a paired bootstrap over documents. The
diagnosis in DIR is resumed. Writes to `bench/results/`.

For tiny-llama about 20 minutes on two cores, for SmolLM2 hours.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import RESULTS, bootstrap, held_out_rows, publish_records

SOURCES = ("essays", "brown", "kjv")
SEED = 0
GROUPS = 4  # of layers in a funnel, with one budget each
BUDGETS = ("h2o", "kivi2", "kivi4")  # of which the bytes are

CAVEAT = (
    "`loss` is nats per token above the full cache, `over uniform` the difference to the best "
    "uniform policy of at most these bytes (by measured loss on the choosing documents), paired by "
    "document: below 0 is better. A random row is the mean of its draws. The scores choose on "
    "other documents than those judged here."
)


@dataclass(frozen=True)
class Judge:
    """Judges one policy per layer on documents that nothing was chosen on."""

    lm: Any
    tokens: np.ndarray
    views: list[Any]  # of a plain walk, for the parameters of its layers
    onward: Any

    @classmethod
    def of(cls, lm: Any, tokens: np.ndarray) -> "Judge":
        from jaxinfer.models.onward import Onward
        from jaxinfer.models.walk import walk

        views = []
        for view in walk(lm, tokens):
            first = view.before if view.index == 0 else view.before[:0]
            views.append(replace(view, **{name: None for name in BULKY}, before=first))
        return cls(lm, tokens, views, Onward(lm, tokens))

    def losses(self, policies: Sequence[Any]) -> np.ndarray:
        """Each document's mean loss."""
        from jaxinfer.models.walk import reread

        states = self.views[0].before
        for view, policy in zip(self.views, policies, strict=True):
            states = reread(self.lm, replace(view, before=states), policy).after
        return self.onward.losses(states, len(policies))


BULKY = ("attention_input", "q", "k", "v", "heads", "mixed", "mlp_input", "gate", "hidden", "after")


def funnel(lm: Any, budget: int, length: int) -> list[Any]:
    """Heavy hitters, three times as many in the first layers as in the last (PyramidKV's shape)."""
    import jaxinfer as ji
    from jaxinfer.eval.memory import layer_bytes

    layers = lm.config.num_layers
    share = np.linspace(1.5, 0.5, GROUPS)[np.arange(layers) * GROUPS // layers]

    def policies(mean: int) -> list[Any]:
        halves = [max(int(mean * x) // 2, 1) for x in share]
        return [ji.h2o(half, half) for half in halves]

    def size(mean: int) -> int:
        found = policies(mean)
        return sum(layer_bytes(lm, one, length)[i] for i, one in enumerate(found))

    low, high = 2, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle - 1)
    return policies(low)


def keys_first(lm: Any, budget: int, length: int, smallest: Any) -> list[Any]:
    """4-bit keys and 2-bit values (KVTuner's finding) in the first layers, as far as bytes go."""
    from jaxinfer.cache.presets import resolve
    from jaxinfer.eval.memory import layer_bytes
    from jaxinfer.theory.diagnose import candidates_for

    (like,), _ = candidates_for(lm, ["kivi4"], length)
    mixed = resolve({**like.written, "name": "kivi", "key_bits": 4, "value_bits": 2})
    sizes = [layer_bytes(lm, one, length) for one in (mixed, smallest)]
    chosen = [smallest] * lm.config.num_layers
    left = budget - sum(sizes[1])
    for layer in range(len(chosen)):
        if sizes[0][layer] - sizes[1][layer] <= left:
            chosen[layer] = mixed
            left -= sizes[0][layer] - sizes[1][layer]
    return chosen


def random_choice(sizes: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """A candidate for each layer, drawn; while they do not fit, some layer takes a smaller one."""
    layers = np.arange(len(sizes))
    chosen = rng.integers(0, sizes.shape[1], len(sizes))
    while sizes[layers, chosen].sum() > budget:
        layer = rng.integers(len(sizes))
        smaller = np.flatnonzero(sizes[layer] < sizes[layer, chosen[layer]])
        if smaller.size:
            chosen[layer] = rng.choice(smaller)
    return chosen


def candidates_of(length: int) -> list[str]:
    """Two precisions and three budgets of eviction, so that choices may fill a budget."""
    evicting = []
    for share in (0.1, 0.2, 0.4):
        kept = int(share * length)
        evicting += [
            f"h2o:heavy={kept // 2}:recent={kept - kept // 2}",
            f"streaming:sinks=4:window={kept - 4}",
        ]
    return ["kivi2", "kivi4", *evicting, "full"]


def compared(
    lm: Any, made: Any, judge: Judge, budget: int, draws: int, scores: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each way to choose."""
    from jaxinfer.theory.diagnose import allocate

    length, layers = made.length, np.arange(len(made.sizes))
    policies = [one.policy for one in made.candidates]
    fits = np.flatnonzero(made.sizes.sum(axis=0) <= budget)
    best = fits[np.argmin(made.measured.sum(axis=0)[fits])]
    smallest = policies[int(made.sizes.sum(axis=0).argmin())]
    ways: dict[str, list[Sequence[Any]]] = {"uniform": [[policies[best]] * len(layers)]}
    for by in scores:
        chosen = allocate(made.losses(by), made.sizes, budget)
        ways[by] = [[policies[c] for c in chosen]]
    ways["funnel"] = [funnel(lm, budget, length)]
    ways["keys before values"] = [keys_first(lm, budget, length, smallest)]
    rng = np.random.default_rng(SEED)
    drawn = [random_choice(made.sizes, budget, rng) for _ in range(draws)]
    ways[f"random ({draws})"] = [[policies[c] for c in one] for one in drawn]
    full = judge.losses(["full"] * len(layers))
    losses = {
        way: np.mean([judge.losses(one) for one in several], axis=0)
        for way, several in ways.items()
    }
    rows = []
    for way, found in losses.items():
        size = np.mean([total_bytes(lm, one, length) for one in ways[way]])
        apart = found - losses["uniform"]
        low, high = bootstrap(lambda i, x=apart: float(x[i].mean()), len(apart), SEED)
        ends = bootstrap(lambda i, x=found: float(np.exp(x[i].mean())), len(found), SEED)
        rows.append(
            {
                "budget": budget, "chosen by": way, "bytes": int(size),
                "perplexity": float(np.exp(found.mean())), "low": ends[0], "high": ends[1],
                "loss": float((found - full).mean()), "over uniform": float(apart.mean()),
                "from": low, "to": high,
            }
        )  # fmt: skip
    return rows


def total_bytes(lm: Any, policies: Sequence[Any], length: int) -> int:
    from jaxinfer.eval.memory import layer_bytes

    return sum(layer_bytes(lm, one, length)[layer] for layer, one in enumerate(policies))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; 0 where one of them is constant."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(x), rankdata(y)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1).prod()
    return float(ranks[0] @ ranks[1] / norms) if norms else 0.0


def rankings(made: Any, scores: Sequence[str]) -> list[dict[str, Any]]:
    """Spearman's correlation of each score with the measured loss over layers, per candidate."""
    measured = made.losses("measured")
    rows = []
    for by in scores:
        if by == "measured":
            continue
        losses = made.losses(by)
        for number, one in enumerate(made.candidates):
            if one.name == "full":
                continue

            def correlation(picked: np.ndarray, c: int = number, x: np.ndarray = losses) -> float:
                if len(set(picked.tolist())) < 3:
                    return 0.0
                return rank_correlation(x[picked, c], measured[picked, c])

            low, high = bootstrap(correlation, len(losses), SEED)
            value = correlation(np.arange(len(losses)))
            rows.append(
                {"score": by, "candidate": one.name, "spearman": value, "low": low, "high": high}
            )
    return rows


def main(
    run_dir: Annotated[Path, typer.Option(help="Working folder of the diagnosis; resumed.")],
    model: Annotated[str, typer.Option(help="As in jaxinfer diagnose.")] = "tiny-llama",
    tokens: Annotated[int, typer.Option(help="Tokens of a document.")] = 512,
    choosing: Annotated[int, typer.Option(help="Documents to choose on.")] = 8,
    judging: Annotated[int, typer.Option(help="Documents to judge on.")] = 24,
    draws: Annotated[int, typer.Option(help="Random choices for each budget.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Under 3 minutes, means little.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the tables go.")] = RESULTS,
) -> None:
    """Tables and plots of what each score chooses, and of how it ranks the layers."""
    import jaxinfer as ji
    from jaxinfer.eval.memory import policy_bytes
    from jaxinfer.progress import bars
    from jaxinfer.theory.diagnose import SCORES, candidates_for, diagnose

    budgets: tuple[str, ...] = BUDGETS
    if quick:
        tokens, choosing, judging, draws, budgets = 96, 2, 4, 2, BUDGETS[2:]
    lm = ji.load(model)
    rows = held_out_rows(lm, choosing + judging, tokens, SOURCES)
    names = ["kivi4", "h2o", "streaming", "full"] if quick else candidates_of(tokens)
    candidates, _ = candidates_for(lm, names, tokens)
    with bars(transient=False) as report:
        made = diagnose(
            lm, rows[:choosing], candidates, run_dir, points=64 if quick else 512, measured=True,
            report=report,
        )  # fmt: skip
    judge = Judge.of(lm, rows[choosing:])
    table: list[dict[str, Any]] = []
    for name in budgets:
        (one,), _ = candidates_for(lm, [name], tokens)
        budget = policy_bytes(lm, one.policy, tokens)
        table += compared(lm, made, judge, budget, draws, SCORES)
    command = f"python tools/reproduce/reproduce_diagnose.py --run-dir DIR --model {model}"
    command += " --quick" * quick
    config = {
        "model": lm.name, "tokens": tokens, "choosing": choosing, "judging": judging,
        "draws": draws, "candidates": [one.name for one in candidates], "sources": SOURCES,
    }  # fmt: skip
    publish: Callable[..., None] = publish_records
    publish(
        f"diagnose-{lm.name}", f"Policies per layer by what chose them ({lm.name})", config, table,
        lambda axes: _plot_choices(axes, table), caveat=CAVEAT, seed=SEED, command=command,
        folder=folder, size=(8.0, 4.5),
    )  # fmt: skip
    ranked = rankings(made, SCORES)
    publish(
        f"diagnose-{lm.name}-scores", f"Do scores rank layers as the loss does? ({lm.name})",
        config, ranked, lambda axes: _plot_ranks(axes, ranked),
        caveat="Spearman's correlation over layers of a score with the loss where that layer alone "
        "is compressed, intervals of a bootstrap over layers. entropy, sink and rank order the "
        "layers alike for every candidate.",
        seed=SEED, command=command, folder=folder, size=(8.0, 4.5),
    )  # fmt: skip


def _plot_choices(axes: Any, rows: list[dict[str, Any]]) -> None:
    ways = list(dict.fromkeys(row["chosen by"] for row in rows))
    for budget in dict.fromkeys(row["budget"] for row in rows):
        kept = {row["chosen by"]: row for row in rows if row["budget"] == budget}
        values = np.array([kept[way]["over uniform"] for way in ways])
        ends = np.array([[kept[way]["from"], kept[way]["to"]] for way in ways])
        bars = np.abs(ends.T - values)
        axes.errorbar(np.arange(len(ways)), values, bars, fmt="o", label=f"{budget:,} bytes")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(np.arange(len(ways)), ways, rotation=30, ha="right")
    axes.set(ylabel="nats per token over uniform")
    axes.legend(frameon=False)


def _plot_ranks(axes: Any, rows: list[dict[str, Any]]) -> None:
    scores = list(dict.fromkeys(row["score"] for row in rows))
    for candidate in dict.fromkeys(row["candidate"] for row in rows):
        values = [row["spearman"] for row in rows if row["candidate"] == candidate]
        axes.plot(scores, values, "o", label=candidate)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(ylabel="Spearman's correlation with the measured loss", ylim=(-1.05, 1.05))
    axes.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    typer.run(main)
