"""Laughing Hyena (arXiv 2310.18780) in figures: errors of filters against the order and its bound,
Hankel spectra, a report per layer, what a distilled model's predictions lose, and where recurrences
overtake attention.

    python tools/reproduce/reproduce_laughing_hyena.py --model my-hyena [--quick]
    python tools/reproduce/reproduce_laughing_hyena.py --only orders,spectra

The model "random" has four layers of random implicit filters with the initialisation that a
language model trains from, whose errors are larger than those of trained filters. "quality" reads
held-out texts, or random tokens where the model has no tokenizer. Perplexity hides what is lost, as
a model does without most of its filters: read agreement and KL beside it.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import RESULTS, held_out_rows, publish_records

SEED = 0
RANDOM = "random"
SOURCES = ("brown", "kjv")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Figure(NamedTuple):
    """Rows, what to draw, and what a reader must know."""

    title: str
    rows: list[dict[str, Any]]
    plot: Callable[[Any], None]
    caveat: str


def random_model(quick: bool) -> Any:
    """laughing_hyena.md 5.6: 33 features, sines of frequency 14, weights of N(0, 0.02^2)."""
    import jax

    import jaxinfer as ji
    from jaxinfer.hyena_config import FilterConfig, HyenaConfig
    from jaxinfer.models import ModelConfig, init_params

    layers, width, length = (2, 32, 64) if quick else (4, 64, 256)
    config = ModelConfig(
        family="hyena", vocab_size=256, hidden_size=width, intermediate_size=2 * width,
        num_layers=layers, num_heads=4, num_kv_heads=4, head_dim=width // 4, norm="layer",
        norm_bias=True, activation="gelu_tanh", gated_mlp=False, mlp_bias=True, positions="none",
        max_positions=length, tie_embeddings=True, mixers=("hyena",) * layers,
        hyena=HyenaConfig(filter=FilterConfig()),
    )  # fmt: skip
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(SEED))
    return ji.LM(config, params, name=RANDOM)


def filters_of(lm: Any, most: int) -> np.ndarray:
    """Filters of all layers, evenly chosen, in float64."""
    from jaxinfer.models.filter_form import long_filters

    found = [np.asarray(h, np.float64) for h in long_filters(lm.config, lm.params) if h is not None]
    if not found:
        raise ValueError(f"model {lm.name!r} has no long filters; give one with Hyena layers")
    rows = np.concatenate(found)
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]


def orders_for(lm: Any, quick: bool) -> tuple[int, ...]:
    """K."""
    each = (2, 4) if quick else (2, 4, 8, 16, 32)
    return tuple(k for k in each if 4 * k < lm.config.max_positions)


def orders(lm: Any, quick: bool) -> Figure:
    """Errors of filters against K, beside the bound that none of the order can beat."""
    import jaxinfer as ji

    h, rows = filters_of(lm, 4 if quick else 24), []
    methods = ("hankel+adam", "balanced", "fir")
    for k in orders_for(lm, quick):
        for method in methods:
            steps = 100 if quick and method == "hankel+adam" else None
            _, report = ji.distill_filters(h, k, method=method, taps=0, steps=steps)
            errors = [one.error for one in report.filters]
            rows.append(
                {
                    "K": k,
                    "method": method,
                    "median error": float(np.median(errors)),
                    "largest": max(errors),
                    "median bound": float(np.median([one.bound for one in report.filters])),
                }
            )

    def plot(axes: Any) -> None:
        for method in methods:
            kept = [row for row in rows if row["method"] == method]
            axes.loglog(
                [r["K"] for r in kept], [r["median error"] for r in kept], "o-", label=method
            )
        kept = [row for row in rows if row["method"] == "balanced"]
        axes.loglog([r["K"] for r in kept], [r["median bound"] for r in kept], "k:", label="bound")
        axes.set(xlabel="modes K", ylabel="relative l2 error behind lag 0")
        axes.legend(frameon=False)

    return Figure(
        f"Errors of {len(h)} filters against the order ({lm.name})",
        rows,
        plot,
        "The bound holds for every filter of 2 K states; that of fir is of its 2 K taps. fir copies"
        " 2 K samples, whose inputs take the same bytes.",
    )


def spectra(lm: Any, quick: bool) -> Figure:
    """Singular values of the filters' Hankel matrices, by layer."""
    from jaxinfer.distill.filters.spectrum import half, hankel_spectrum
    from jaxinfer.models.filter_form import long_filters

    rows: list[dict[str, Any]] = []
    curves: dict[int, np.ndarray] = {}
    for layer, h in enumerate(long_filters(lm.config, lm.params)):
        if h is None:
            continue
        g = np.asarray(h, np.float64)[:: 8 if quick else 1, 1:]
        rank = min(96, g.shape[1] // 2)
        values = hankel_spectrum(g, half(g.shape[1]), rank).values
        curves[layer] = np.median(values / np.maximum(values[:, :1], 1e-300), axis=0)
        above = {
            f"states above {share:g}": float(
                np.median((values > share * values[:, :1]).sum(axis=1))
            )
            for share in (0.1, 0.01, 0.001)
        }
        rows.append({"layer": layer, "filters": len(g)} | above)

    def plot(axes: Any) -> None:
        for layer, curve in curves.items():
            axes.semilogy(np.arange(1, len(curve) + 1), curve, label=f"layer {layer}")
        axes.set(xlabel="singular value", ylabel="share of the first, median", ylim=(1e-6, 2))
        axes.legend(frameon=False)

    return Figure(
        f"Hankel spectra ({lm.name})",
        rows,
        plot,
        "Medians over a layer's filters. As many states as values above a share of the first leave "
        "an error of one to two such shares.",
    )


def layers(lm: Any, quick: bool) -> Figure:
    """What automatic orders make of each layer."""
    import jaxinfer as ji

    found = ji.distill(lm, method="balanced" if quick else "hankel+adam", tolerance=0.01)
    rows = []
    for one in found.report.layers:
        errors = [each.error for each in one.filters.filters]
        rows.append(
            {
                "layer": one.layer,
                "form": one.form,
                "K": one.filters.modes,
                "taps": one.filters.taps,
                "median error": float(np.median(errors)),
                "largest": max(errors),
                "slowest radius": max(each.radius for each in one.filters.filters),
            }
        )

    def plot(axes: Any) -> None:
        axes.bar([row["layer"] for row in rows], [row["K"] for row in rows])
        axes.set(xlabel="layer", ylabel="modes for a tolerance of 0.01")

    return Figure(
        f"Automatic orders by layer ({lm.name})",
        rows,
        plot,
        "A layer of which a filter stays above the tolerance stays exact.",
    )


def cut(lm: Any, lag: int) -> Any:
    """The model with filters that end behind a lag."""
    from jaxinfer.models.filter_form import long_filters, with_filters

    config, params = with_filters(lm.config, lm.params, "exact")
    assert config.hyena is not None
    filters = replace(config.hyena.filter, kind="explicit")
    made = []
    for layer, h in zip(params["layers"], long_filters(lm.config, lm.params), strict=True):
        if h is not None:
            own = layer["hyena"]
            short = h.at[:, 0].add(-own["skip"]).at[:, lag + 1 :].set(0)
            layer = layer | {"hyena": own | {"filter": {"h": short}}}
        made.append(layer)
    config = replace(config, hyena=replace(config.hyena, filter=filters))
    return replace(lm, config=config, params=params | {"layers": tuple(made)})


def quality(lm: Any, quick: bool) -> Figure:
    """What predictions lose: modes against K, samples of equal bytes, and filters that are cut."""
    import jaxinfer as ji

    length = min(lm.config.max_positions, 256)
    if lm.tokenizer is None:
        shape = (4, length)
        tokens = np.random.default_rng(SEED).integers(0, lm.config.vocab_size, shape)
    else:
        tokens = held_out_rows(lm, 8 if quick else 40, length, SOURCES)
    exact = log_probs(lm, tokens)
    forms = {f"cut at lag {lag}": (lag, cut(lm, lag)) for lag in (0, 16)}
    for k in orders_for(lm, quick):
        options = {"all_modal": True, "taps": 0, "method": "balanced" if quick else "hankel+adam"}
        forms[f"modes, K = {k}"] = k, ji.distill(lm, k, **options)
        forms[f"fir of K = {k}"] = k, ji.distill(lm, k, method="fir", all_modal=True)
    rows: list[dict[str, Any]] = [
        {"form": form, "K or lag": k} | lost(exact, log_probs(one, tokens), tokens)
        for form, (k, one) in forms.items()
    ]
    worst = rows[0]["nats more"]
    for row in rows:
        row["given back of cut at lag 0"] = 1 - row["nats more"] / worst if worst > 0 else None

    def plot(axes: Any) -> None:
        for name in ("modes", "fir"):
            kept = [row for row in rows if row["form"].startswith(name)]
            places = [row["K or lag"] for row in kept]
            axes.loglog(places, [row["KL"] for row in kept], "o-", label=name)
        axes.set(xlabel="K", ylabel="KL from the exact model, nats a token")
        axes.legend(frameon=False)

    return Figure(
        f"What predictions lose ({lm.name}, {tokens.size} tokens)",
        rows,
        plot,
        "Teacher-forced. Random models repeat their input, so that the likeliest token says little "
        "of them; no figure of a random model is one of quality.",
    )


def log_probs(lm: Any, tokens: np.ndarray) -> np.ndarray:
    """f32[B, T, V]"""
    logits = np.asarray(lm.logits(tokens))
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def lost(exact: np.ndarray, found: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Against the exact model's log-probabilities."""
    following = tokens[:, 1:, None]
    ours, theirs = (np.take_along_axis(x[:, :-1], following, axis=2).mean() for x in (found, exact))
    return {
        "nats more": float(theirs - ours),
        "KL": float((np.exp(exact) * (exact - found)).sum(axis=-1).mean()),
        "same likeliest token": float((exact.argmax(axis=-1) == found.argmax(axis=-1)).mean()),
    }


def crossover(lm: Any, quick: bool) -> Figure:
    """Bytes of a row and milliseconds of a step against the prompt, beside attention."""
    from bench.models import load_model, prompts
    from bench.routines import recurrence

    peer = load_model("tiny-random" if quick else "tiny-llama")
    sizes = {"prompts": (16, 64) if quick else (128, 512, 1024, 2048), "modes": 4 if quick else 16,
             "new": 8 if quick else 64, "group": 16, "residual": 16 if quick else 128}  # fmt: skip
    rows = []
    for length in sizes["prompts"]:
        given = prompts(SEED, 1, length, peer.config.vocab_size)
        found = recurrence.contenders(peer, length + sizes["new"], sizes)
        for form, (one, policy) in found.items():
            recurrence.measure(one, given, sizes["new"], policy)  # compiles
            timed = recurrence.measure(one, given, sizes["new"], policy)
            rows.append(
                {
                    "prompt": length,
                    "form": form,
                    "ms a step": timed["ms_per_step"],
                    "bytes of a row": timed["cache_bytes"],
                }
            )

    def plot(axes: Any) -> None:
        for form in dict.fromkeys(row["form"] for row in rows):
            kept = [row for row in rows if row["form"] == form]
            axes.loglog(
                [r["prompt"] for r in kept], [r["bytes of a row"] for r in kept], "o-", label=form
            )
        axes.set(xlabel="prompt", ylabel="bytes of a row's cache")
        axes.legend(frameon=False)

    return Figure(
        f"Recurrences beside attention, in the shape of {peer.name}",
        rows,
        plot,
        "Random long convolutions of the transformer's width and depth; one run each; `jaxinfer "
        "bench recurrence` has rounds.",
    )


FIGURES = {
    "orders": orders,
    "spectra": spectra,
    "layers": layers,
    "quality": quality,
    "crossover": crossover,
}


@app.command()
def figures(
    model: Annotated[str, typer.Option(help='A model with Hyena layers, or "random".')] = RANDOM,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: some minutes.")] = False,
    only: Annotated[
        str, typer.Option(help="Some of orders, spectra, layers, quality, crossover.")
    ] = "",
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = RESULTS,
) -> None:
    """Every figure, or those named."""
    from bench.models import load_model

    names = only.split(",") if only else list(FIGURES)
    unknown = sorted(set(names) - set(FIGURES))
    if unknown:
        raise typer.BadParameter(f"--only knows {', '.join(FIGURES)}; got {unknown[0]}")
    lm = random_model(quick) if model == RANDOM else load_model(model)
    for name in names:
        found = FIGURES[name](lm, quick)
        publish_records(
            f"laughing-hyena-{name}-{Path(model).name}",
            found.title,
            {"figure": name, "model": Path(model).name, "quick": quick},
            found.rows,
            found.plot,
            caveat=found.caveat,
            seed=SEED,
            folder=folder,
            command=f"python tools/reproduce/reproduce_laughing_hyena.py "
            f"--model {Path(model).name} --only {name}" + (" --quick" if quick else ""),
        )


if __name__ == "__main__":
    app()
