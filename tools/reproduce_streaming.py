"""StreamingLLM's figures on real models: perplexity over a long stream, and time against
re-computation.

    python tools/reproduce_streaming.py stream [--model smollm2-135m --tokens 100000 --window 1020]
    python tools/reproduce_streaming.py latency [--model smollm2-135m --caches 256,512,1024]

"stream" reads one long held-out stream with a full cache past the model's context ("dense", until
`--dense` tokens), with a plain window and with sinks (arXiv 2309.17453, figure 3). "latency" times
one decoded token with the streaming cache and one by sliding-window re-computation, its quality
oracle, which reads the window anew for every token (figure 10). Both write to `bench/results/`.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.figures import publish

STEPS = 16  # decoded per measurement
FAR = 4_000_000  # tokens streamed before, for the step that must not have become slower

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def stream(
    model: Annotated[str, typer.Option(help="Model name or folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens of the stream.")] = 100_000,
    window: Annotated[int, typer.Option(help="Recent tokens.")] = 1020,
    sinks: Annotated[int, typer.Option(help="Sink tokens.")] = 4,
    dense: Annotated[int, typer.Option(help="Tokens at which the full cache stops.")] = 12_288,
    source: Annotated[list[str] | None, typer.Option(help="Sources of texts, in order.")] = None,
    split: Annotated[str, typer.Option(help="heldout, train, or both.")] = "heldout",
    every: Annotated[int, typer.Option(help="Tokens per point of the curves.")] = 2048,
) -> None:
    """Perplexity over a long stream: dense, window, sinks."""
    import jaxinfer as ji
    from jaxinfer.eval.documents import token_stream
    from jaxinfer.eval.memory import policy_bytes
    from jaxinfer.eval.stream import stream_perplexity
    from jaxinfer.eval.tables import Row
    from jaxinfer.train.texts import available_sources, read_source

    lm = ji.load(model)
    sources = source or ["anarchism"]
    missing = set(sources) - set(available_sources())
    if missing:
        raise typer.BadParameter(f"texts {sorted(missing)} are missing; run tools/fetch_texts.py")
    splits = ["train", "heldout"] if split == "both" else [split]

    def texts():
        for name in sources:
            for part in splits:
                yield from (document.text for document in read_source(name, part))

    policies = {
        "dense": (ji.full(), dense),
        f"window {window + sinks}": (ji.streaming(0, window + sinks), None),
        f"{sinks} sinks + {window}": (ji.streaming(sinks, window), None),
    }
    curves, rows = {}, []
    for label, (policy, limit) in policies.items():
        pieces = token_stream(lm, texts(), tokens, repeat=True)

        def report(done: int, label: str = label) -> None:
            print(f"\r{label}: {done} tokens", end="", file=sys.stderr)

        curve = stream_perplexity(lm, pieces, policy, every=every, limit=limit, report=report)
        print(file=sys.stderr)
        curves[label] = curve
        length = min(tokens, limit or tokens)
        needed = policy_bytes(lm, policy, length)
        share = needed / policy_bytes(lm, ji.full(), tokens)
        metrics = {
            "perplexity": curve.perplexity,
            "first": curve.points[0].nll,
            "last": curve.points[-2 if len(curve.points) > 1 else -1].nll,
            "tokens": curve.tokens,
            "cache_mb": curve.cache_bytes / 1e6,
            "tokens_per_s": curve.tokens / curve.seconds,
        }
        rows.append(Row(label, policy.name, needed / length, share, metrics))

    def plot(axes) -> None:
        for label, curve in curves.items():
            ends = [point.end / 1000 for point in curve.points]
            axes.plot(ends, [min(point.nll, 12) for point in curve.points], label=label)
        axes.axvline(lm.config.max_positions / 1000, color="#9aa5b1", linewidth=1, linestyle=":")
        axes.set_xlabel("thousand tokens read (dotted: the trained context)")
        axes.set_ylabel("nats per token")
        axes.legend(frameon=False, fontsize=8)

    command = (
        f"python tools/reproduce_streaming.py stream --model {model} --tokens {tokens} "
        f"--window {window} --sinks {sinks} --dense {dense} --every {every} --split {split}"
        + "".join(f" --source {name}" for name in sources)
    )
    config = {
        "model": lm.name, "tokens": tokens, "window": window, "sinks": sinks, "every": every,
        "sources": sources, "split": split,
        "curves": {n: [(p.end, round(p.nll, 4)) for p in c.points] for n, c in curves.items()},
    }  # fmt: skip
    title = f"A stream of {tokens:,} tokens through {lm.name}"
    publish(f"streaming-{lm.name}", title, config, rows, plot, seed=0, command=command)


@app.command()
def latency(
    model: Annotated[str, typer.Option(help="Model name or folder.")] = "smollm2-135m",
    caches: Annotated[str, typer.Option(help="Cache sizes in tokens.")] = "256,512,1024,2048,4096",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
) -> None:
    """Time per token: the streaming cache against sliding-window re-computation."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    import jaxinfer as ji
    from jaxinfer.decode.engine import make_requests
    from jaxinfer.eval.memory import policy_bytes
    from jaxinfer.eval.tables import Row
    from jaxinfer.models.stack import forward

    lm = ji.load(model)
    engine, vocab = lm.engine, lm.config.vocab_size
    recompute = jax.jit(lambda params, tokens: forward(lm.config, params, tokens, logits="last"))
    rows, sizes = [], [int(size) for size in caches.split(",")]

    def decoder(policy, streamed: int):
        """A function that decodes STEPS tokens after `streamed` ones, in seconds per token; what
        the cache holds does not matter to the time."""
        cache = replace(engine.new_cache(policy, 1, 64), length=jnp.full((1,), streamed, jnp.int32))
        requests = make_requests([ji.Sampler()], [0], [1 << 30], (), vocab)
        seen = jnp.zeros((1, 1), bool)
        state = engine.begin(cache, jnp.zeros((1, vocab)), requests, seen, STEPS)

        def run() -> float:
            nonlocal state
            start = time.perf_counter()
            state = jax.block_until_ready(engine.decode(requests, state, STEPS))
            return (time.perf_counter() - start) / STEPS

        return run

    for size in sizes:
        policy = ji.streaming(4, size - 4)
        window = jnp.zeros((1, size), jnp.int32)
        soon, late = decoder(policy, size + 1), decoder(policy, FAR)
        times: dict[str, list[float]] = {"streaming": [], "streamed": [], "recompute": []}
        for index in range(rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(recompute(lm.params, window).logits)
            found = {
                "recompute": time.perf_counter() - start,
                "streaming": soon(),
                "streamed": late(),
            }
            if index:  # the first round compiles
                for name, seconds in found.items():
                    times[name].append(seconds)
        ratios = [b / a for a, b in zip(times["streaming"], times["recompute"], strict=True)]
        growth = [b / a for a, b in zip(times["streaming"], times["streamed"], strict=True)]
        metrics = {
            "streaming_ms": 1e3 * statistics.median(times["streaming"]),
            "recompute_ms": 1e3 * statistics.median(times["recompute"]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "after_4_million": statistics.median(growth),
        }
        needed = policy_bytes(lm, policy, size)
        share = needed / policy_bytes(lm, ji.full(), size)
        rows.append(Row(f"cache {size}", policy.name, needed / size, share, metrics))
        typer.echo(f"cache {size}: {metrics}", err=True)

    def plot(axes) -> None:
        for name, colour in (("recompute_ms", "#d9822b"), ("streaming_ms", "#1b6ca8")):
            values = [row.metrics[name] for row in rows]
            axes.plot(sizes, values, "-o", color=colour, label=name.removesuffix("_ms"))
        for size, row in zip(sizes, rows, strict=True):
            top = (size, row.metrics["recompute_ms"])
            axes.annotate(f"{row.metrics['ratio']:.0f}x", top, (0, 6), textcoords="offset points")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("cache size, tokens")
        axes.set_ylabel("ms per token")
        axes.legend(frameon=False, fontsize=8)

    command = (
        f"python tools/reproduce_streaming.py latency --model {model} --caches {caches} "
        f"--rounds {rounds}"
    )
    title = f"Decoding {lm.name}: streaming cache against re-computation"
    config = {"model": lm.name, "caches": sizes, "rounds": rounds}
    publish(f"latency-{lm.name}", title, config, rows, plot, seed=0, command=command)


if __name__ == "__main__":
    app()
