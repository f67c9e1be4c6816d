"""StreamingLLM's figures: perplexity over a long stream, time against re-computation, and a toy
whose attention needs its sink.

    python tools/reproduce/reproduce_streaming.py stream [--model tiny-llama --tokens 100000]
    python tools/reproduce/reproduce_streaming.py latency [--caches 256,512,1024]
    python tools/reproduce/reproduce_streaming.py sinks [--steps 600]

"stream" reads one long held-out stream with a full cache past the model's context ("dense", until
`--dense` tokens), with a plain window, with sinks and by re-computation of a window that moves by
`--stride` tokens (arXiv 2309.17453, figure 3). "latency" times one decoded token with the streaming
cache and one by sliding-window re-computation, its quality oracle, which reads the window anew for
every token (figure 10). "sinks" trains the toy and reads it with 0 to 4 sinks. All write to
`bench/results/`.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import publish, read_rows

if TYPE_CHECKING:
    import numpy as np

    from jaxinfer.eval.curve import Curve
    from jaxinfer.lm import LM

STEPS = 16  # decoded per measurement
SYMBOLS, TRIGGERS, SINK = 64, 8, 64  # of the toy: tokens, those that copy, and the first of all
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
    stride: Annotated[
        int | None, typer.Option(help="Of the re-computed window (its quarter); 0 leaves it out.")
    ] = None,
) -> None:
    """Perplexity over a long stream: dense, window, sinks, re-computation."""
    import jaxinfer as ji
    from jaxinfer.eval.documents import token_stream
    from jaxinfer.eval.memory import policy_bytes
    from jaxinfer.eval.recompute import recompute_perplexity
    from jaxinfer.eval.stream import stream_perplexity
    from jaxinfer.eval.tables import Row

    lm = ji.load(model)
    sources = source or ["anarchism"]
    _check_sources(sources)
    policies = {
        "dense": (ji.full(), dense),
        f"window {window + sinks}": (ji.streaming(0, window + sinks), None),
        f"{sinks} sinks + {window}": (ji.streaming(sinks, window), None),
    }
    curves, rows = {}, []

    def add(label: str, read: Callable, name: str, needed: float, length: int) -> None:
        def report(done: int) -> None:
            print(f"\r{label}: {done} tokens", end="", file=sys.stderr)

        text = token_stream(lm, _texts(sources, split), tokens, repeat=True)
        curve = read(text, every=every, report=report)
        print(file=sys.stderr)
        curves[label] = curve
        share = needed / policy_bytes(lm, ji.full(), tokens)
        rows.append(Row(label, name, needed / length, share, _metrics(curve)))

    for label, (policy, limit) in policies.items():
        length = min(tokens, limit or tokens)
        read = partial(stream_perplexity, lm, policy=policy, limit=limit)
        add(label, read, policy.name, policy_bytes(lm, policy, length), length)
    size = min(window + sinks, lm.config.max_positions)
    stride = max(size // 4, 1) if stride is None else stride
    if stride:
        read = partial(recompute_perplexity, lm, window=size, stride=stride)
        add(f"recompute {size}", read, f"none, moved by {stride}", 0, tokens)

    def plot(axes) -> None:
        for label, curve in curves.items():
            ends = [point.end / 1000 for point in curve.points]
            axes.plot(ends, [min(point.nll, 12) for point in curve.points], label=label)
        axes.axvline(lm.config.max_positions / 1000, color="#9aa5b1", linewidth=1, linestyle=":")
        axes.set_xlabel("thousand tokens read (dotted: the trained context)")
        axes.set_ylabel("nats per token")
        axes.legend(frameon=False, fontsize=8)

    command = (
        f"python tools/reproduce/reproduce_streaming.py stream --model {model} --tokens {tokens} "
        f"--window {window} --sinks {sinks} --dense {dense} --every {every} --stride {stride} "
        f"--split {split}" + "".join(f" --source {name}" for name in sources)
    )
    config = {
        "model": lm.name, "tokens": tokens, "window": window, "sinks": sinks, "every": every,
        "stride": stride, "sources": sources, "split": split,
        "curves": {n: [(p.end, round(p.nll, 4)) for p in c.points] for n, c in curves.items()},
    }  # fmt: skip
    title = f"A stream of {tokens:,} tokens through {lm.name}"
    publish(f"streaming-{lm.name}", title, config, rows, plot, seed=0, command=command)


def _check_sources(sources: list[str]) -> None:
    from jaxinfer.texts import available_sources

    missing = set(sources) - set(available_sources())
    if missing:
        raise typer.BadParameter(
            f"texts {sorted(missing)} are missing; run tools/data/fetch_texts.py"
        )


def _texts(sources: list[str], split: str) -> Iterator[str]:
    from jaxinfer.texts import read_source

    for name in sources:
        for part in ["train", "heldout"] if split == "both" else [split]:
            yield from (document.text for document in read_source(name, part))


def _metrics(curve: "Curve") -> dict[str, float]:
    return {
        "perplexity": curve.perplexity,
        "first": curve.points[0].nll,
        "last": curve.points[-2 if len(curve.points) > 1 else -1].nll,
        "tokens": curve.tokens,
        "cache_mb": curve.cache_bytes / 1e6,
        "tokens_per_s": curve.tokens / curve.seconds,
    }


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
        seen = jnp.zeros((1, 1), jnp.int32)
        state = engine.init_state(cache, jnp.zeros((1, vocab)), requests, seen, STEPS)

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
        f"python tools/reproduce/reproduce_streaming.py latency --model {model} --caches {caches} "
        f"--rounds {rounds}"
    )
    title = f"Decoding {lm.name}: streaming cache against re-computation"
    config = {"model": lm.name, "caches": sizes, "rounds": rounds}
    publish(f"latency-{lm.name}", title, config, rows, plot, seed=0, command=command)


@app.command()
def sinks(
    steps: Annotated[int, typer.Option(help="Updates.")] = 600,
    layers: Annotated[int, typer.Option(help="Layers of the toy.")] = 2,
    context: Annotated[int, typer.Option(help="Tokens of a training window.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of the stream.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of parameters and training data.")] = 0,
) -> None:
    """Trains a toy behind a learnable sink token and streams it with 0, 1, 2 and 4 sinks."""
    import numpy as np

    import jaxinfer as ji
    from jaxinfer.eval.memory import policy_bytes
    from jaxinfer.eval.tables import Row

    lm = train_backcopy(layers, context, steps, seed)
    row = np.concatenate([[SINK], backcopy(1, tokens, seed=1)[0]]).astype(np.int32)
    kept, rows, curves = context // 2, [], {}
    for count in (0, 1, 2, 4):
        policy = ji.streaming(count, kept - count)
        found = read_rows(lm, policy, row[None])[0][0][kept:]
        needed = policy_bytes(lm, policy, tokens)
        share = needed / policy_bytes(lm, ji.full(), tokens)
        curves[f"{count} + {kept - count}"] = found
        metrics = {"perplexity": float(np.exp(-found.mean()))}
        rows.append(Row(f"{count} + {kept - count}", policy.name, needed / tokens, share, metrics))
    found = recomputed(lm, row, kept)
    curves["recompute"] = found
    rows.append(Row("recompute", "none", 0, 0, {"perplexity": float(np.exp(-found.mean()))}))

    def plot(axes) -> None:
        part = max(tokens // 32, 1)
        for label, log_probs in curves.items():
            nats = -log_probs[: len(log_probs) // part * part].reshape(-1, part).mean(axis=1)
            axes.plot(kept + part * np.arange(1, len(nats) + 1), nats, label=label)
        axes.set_xlabel("tokens read, after the cache is full")
        axes.set_ylabel("nats per token")
        axes.legend(frameon=False, fontsize=8)

    command = (
        f"python tools/reproduce/reproduce_streaming.py sinks --steps {steps} --layers {layers} "
        f"--context {context} --tokens {tokens} --seed {seed}"
    )
    config = {"steps": steps, "layers": layers, "context": context, "tokens": tokens}
    title = f"A toy of {layers} layers with a learnable sink token"
    publish("streaming-sinks", title, config, rows, plot, seed=seed, command=command)


def backcopy(rows: int, tokens: int, seed: int) -> "np.ndarray":
    """i32[rows, tokens] of a Markov chain in which an even trigger is followed by the token before
    it and an odd one by that before the latter, unless triggers are among these: "bigram-backcopy"
    of arXiv 2410.13835. The head that copies has nothing to look at most of the time, and models
    learn to send it to the first token then."""
    import numpy as np

    rng = np.random.default_rng(0)  # the chain is the same for every seed
    steps = rng.dirichlet(np.full(SYMBOLS, 0.1), SYMBOLS).cumsum(axis=1)
    rng = np.random.default_rng([1, seed])
    out = rng.integers(0, SYMBOLS, (rows, tokens)).astype(np.int32)
    for t in range(1, tokens):
        last = out[:, t - 1]
        drawn = (steps[last] < rng.random(rows)[:, None]).sum(axis=1).clip(0, SYMBOLS - 1)
        before, far = out[:, max(t - 2, 0)], out[:, max(t - 3, 0)]
        copies = (last < TRIGGERS) & (before >= TRIGGERS) & (far >= TRIGGERS) & (t > 2)
        out[:, t] = np.where(copies, np.where(last % 2, far, before), drawn)
    return out


def train_backcopy(layers: int, context: int, steps: int, seed: int = 0) -> "LM":
    """A model of width 64 trained on windows of `backcopy` that all begin with the token SINK. Of
    one head per layer: two share the work so that one need not rest."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxinfer.config import ModelConfig, RopeConfig
    from jaxinfer.lm import LM
    from jaxinfer.models.params import init_params
    from jaxinfer.train.language_model import next_token_loss
    from jaxinfer.train.loop import make_update, new_state

    cfg = ModelConfig(
        family="llama", vocab_size=SYMBOLS + 1, hidden_size=64, intermediate_size=64,
        num_layers=layers, num_heads=1, num_kv_heads=1, head_dim=32, max_positions=context,
        rope=RopeConfig(rotary_dim=32), bos_token_id=SINK,
    )  # fmt: skip
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 6, steps)
    transform = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
    )
    state = new_state(init_params(cfg, jax.random.key(seed)), transform, seed)
    update = make_update(next_token_loss(cfg), transform)
    for step in range(steps):
        batch = np.pad(
            backcopy(32, context, seed=10**6 * (seed + 1) + step), [(0, 0), (1, 0)],
            constant_values=SINK,
        )  # fmt: skip
        state, metrics = update(state, jnp.asarray(batch))
        if step % 50 == 0 or step == steps - 1:
            print(f"\rstep {step}: loss {float(metrics['loss']):.3f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return LM(cfg, state.params, name="backcopy")


def recomputed(lm: "LM", row: "np.ndarray", kept: int) -> "np.ndarray":
    """log p of the tokens of `row` (which begins with SINK) from `kept` + 1 on, each given SINK and
    the `kept` tokens before it, read anew."""
    import jax
    import numpy as np

    windows = np.lib.stride_tricks.sliding_window_view(row, kept + 2)
    found = []
    for part in np.split(windows, range(128, len(windows), 128)):
        batch = np.zeros((128, kept + 2), np.int32)
        batch[: len(part)] = part
        batch[:, 0] = SINK
        log_probs = jax.nn.log_softmax(lm.logits(batch[:, :-1])[:, -1])
        found.append(np.asarray(log_probs)[np.arange(len(part)), part[:, -1]])
    return np.concatenate(found)


if __name__ == "__main__":
    app()
