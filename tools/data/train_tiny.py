"""Trains the committed small models, `checkpoints/tiny-llama`, `tiny-opt`, `tiny-hyena` and
`tiny-multihyena`: tokenizer, model, card.

    python tools/data/fetch_texts.py
    python tools/data/train_tiny.py --run-dir DIR [--snapshots DIR]
    python tools/data/train_tiny.py --run-dir DIR --architecture opt --l1 X --ramp STEPS
    python tools/data/train_tiny.py --run-dir DIR --architecture opt --activation identity
    python tools/data/train_tiny.py --run-dir DIR --architecture hyena
    python tools/data/train_tiny.py --run-dir DIR --architecture multihyena

One command does everything and may be killed at any moment: given the same options again it
goes on where it was, and on a finished run it only evaluates and exports. The defaults are the
recipe of tiny-llama; data and mixture are fixed below. What is held out is never trained on
(`jaxinfer.texts`). The card is written by `tools/data/tiny_card.py`.

An OPT has ReLU blocks eight times as wide as the model. `--l1` makes few of their neurons active:
a penalty on the activations that grows from 0 within the first `--ramp` updates
(`jaxinfer.train.sparse_activations`). The log tells each layer's density. With `--activation
identity` its blocks have no nonlinearity, to compare training dynamics (`jaxinfer dynamics
--checkpoints`).

A Hyena is the same Llama with long convolutions in place of attention and without positions; a
MultiHyena has heads of 8 channels under one filter each (arXiv 2310.18780). Filters start as in a
language model of the Hyena paper (`jaxinfer.hyena_config.FilterConfig`).

With the schedule wsd (warm up, stay, decay) `--steps` (500 or more) may change on the way while the
learning rate is still constant, that is, in the first three quarters: the result is that of a run
started with the new number.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.files import read_json, replacing, write_json
from jaxinfer.hyena_config import HyenaConfig
from jaxinfer.progress import bars

END = "<|endoftext|>"
END_ID = 0
# How often each source's training part appears in one pass; pages of reference lists are left out.
MIXTURE = {"anarchism": 1, "brown": 2, "kjv": 1, "pydoc": 1, "jargon": 1, "devil": 2}
SKIPPED_PREFIXES = ("library/", "using/", "extending/")
DATA_SEED = 1
DECAY = 0.25  # the part of the run in which the learning rate falls
Architecture = Literal["llama", "opt", "hyena", "multihyena"]
HEAD_SIZE = 8  # of a MultiHyena
SIZES = ("steps", "batch", "context", "short", "width", "layers", "vocab")
COMMAND_OPTIONS = (
    "architecture",
    "activation",
    *SIZES,
    "optimizer",
    "schedule",
    "peak",
    "l1",
    "ramp",
    "seed",
)


def training_documents(folder: Path | None, sources: list[str]) -> Iterator[tuple[str, str]]:
    """(source, text) of every document that may be trained on."""
    from jaxinfer.texts import read_source

    for source in sources:
        for document in read_source(source, "train", folder):
            if not document.name.startswith(SKIPPED_PREFIXES):
                yield source, document.text


def train_tokenizer(texts: Iterator[str], vocab_size: int, path: Path):
    """A byte-level BPE with digits split one by one; id 0 is the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with replacing(path) as temporary:
        tokenizer.save(str(temporary))
    return tokenizer


def prepare(run: Path, texts: Path | None, sources: list[str], vocab_size: int) -> None:
    """Writes `tokenizer.json` and `tokens.bin` into the run's folder, unless they are there."""
    import numpy as np
    from tokenizers import Tokenizer

    from jaxinfer.train.data import write_tokens

    path = run / "tokenizer.json"
    if not path.is_file():
        documents = training_documents(texts, sources)
        train_tokenizer((text for _, text in documents), vocab_size, path)
    if (run / "tokens.bin").is_file():
        return
    tokenizer = Tokenizer.from_file(str(path))
    rows = []
    for source, text in training_documents(texts, sources):
        row = np.asarray(tokenizer.encode(text).ids, np.uint16)
        rows += [row] * MIXTURE.get(source, 1)
    order = np.random.default_rng(DATA_SEED).permutation(len(rows))
    count = write_tokens(run / "tokens.bin", (rows[i] for i in order), END_ID)
    typer.echo(f"{count} training tokens in {len(rows)} documents")


def model_config(
    architecture: Architecture, vocab_size: int, width: int, layers: int, context: int,
    activation: Literal["relu", "identity"] = "relu",
) -> ModelConfig:  # fmt: skip
    """A tied model of head size 32: a Llama whose query heads share key/value heads by three, else
    by two, a Hyena with its blocks, or an OPT with blocks eight times as wide as the model."""
    heads = width // 32
    group = next(group for group in (3, 2, 1) if heads % group == 0)
    common = {
        "family": architecture, "vocab_size": vocab_size, "hidden_size": width,
        "num_layers": layers, "num_heads": heads, "head_dim": 32, "max_positions": context,
        "tie_embeddings": True, "eos_token_ids": (END_ID,),
    }  # fmt: skip
    if architecture == "llama":
        return ModelConfig(
            **common,
            num_kv_heads=heads // group,
            intermediate_size=-(-width * 8 // 3 // 32) * 32,
            rope=RopeConfig(theta=10000.0, rotary_dim=32),
        )
    if architecture in ("hyena", "multihyena"):
        return ModelConfig(
            **common | {"family": "hyena"},
            num_kv_heads=heads // group,
            intermediate_size=-(-width * 8 // 3 // 32) * 32,
            positions="none",
            mixers=("hyena",) * layers,
            hyena=HyenaConfig(head_size=HEAD_SIZE if architecture == "multihyena" else 1),
        )
    return ModelConfig(
        **common,
        num_kv_heads=heads,
        intermediate_size=8 * width,
        norm="layer",
        norm_bias=True,
        activation=activation,
        gated_mlp=False,
        positions="learned",
        position_offset=2,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def transform(optimizer: str, schedule: str, peak: float, steps: int):
    """The Optax transform of a run; both optimisers clip the gradient to the global norm 1."""
    from jaxinfer.train import optimizers

    warmup = min(50, steps // 10)
    if schedule == "wsd":
        rate = optimizers.warmup_stable_decay(peak, steps, warmup=warmup, decay=DECAY)
    else:
        rate = optimizers.warmup_cosine(peak, steps, warmup=warmup)
    return optimizers.muon(rate) if optimizer == "muon" else optimizers.adamw(rate)


def log_spaced(steps: int, first: int = 5) -> list[int]:
    """0, `first`, its doubles, and `steps`: twelve numbers for 3000 steps."""
    doubles = [first * 2**i for i in range(steps.bit_length())]
    return sorted({0, steps, *(step for step in doubles if step < steps)})


def saved_step(run: Path) -> int:
    """The last update that a run has saved."""
    return max((int(p.name) for p in (run / "state").glob("*") if p.name.isdigit()), default=0)


def snapshot_folder(snapshots: Path, step: int) -> Path:
    return snapshots / f"step-{step:06d}"


def warn_of_lost_snapshots(run: Path, snapshots: Path, steps: int) -> None:
    """Says which snapshots a resumed run can no longer make."""
    saved = saved_step(run)
    lost = [
        step
        for step in log_spaced(steps)
        if step < saved and not snapshot_folder(snapshots, step).is_dir()
    ]
    if lost:
        typer.echo(
            f"warning: {run} is at step {saved} already, so there will be no snapshots of steps "
            f"{', '.join(map(str, lost))}; for all of them start in a new --run-dir",
            err=True,
        )


def evaluate(cfg: ModelConfig, params, run: Path, texts: Path | None, windows: int) -> dict:
    """Held-out loss per source, on whole documents, and of ReLU blocks each layer's density."""
    from tokenizers import Tokenizer

    from jaxinfer.texts import available_sources, read_source
    from jaxinfer.train.language_model import held_out_loss
    from jaxinfer.train.sparse_activations import held_out_density

    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    results = {}
    for source in available_sources(texts):
        documents = [
            (tokenizer.encode(document.text).ids, len(document.text.encode()))
            for document in read_source(source, "heldout", texts)
        ]
        if documents:
            loss = held_out_loss(
                cfg, params, documents, length=cfg.max_positions, end=END_ID, max_windows=windows
            )
            results[source] = {
                "documents": loss.documents,
                "tokens": loss.tokens,
                "nats_per_token": round(loss.nats_per_token, 4),
                "bits_per_byte": round(loss.bits_per_byte, 4),
            }
            if cfg.activation == "relu":
                density = held_out_density(
                    cfg, params, documents, length=cfg.max_positions, end=END_ID,
                    max_windows=windows,
                )  # fmt: skip
                results[source]["density"] = [round(float(share), 4) for share in density]
    return results


def export(folder: Path, cfg: ModelConfig, params, run: Path, provenance: dict):
    """Writes one model folder, a Llama in bfloat16 and any other in int8 rows; returns the
    parameters as stored."""
    import jax.numpy as jnp
    from tokenizers import Tokenizer as Backend

    from jaxinfer.io.checkpoint import Checkpoint, save_checkpoint
    from jaxinfer.io.int8 import as_stored
    from jaxinfer.io.tokenizer import Tokenizer
    from jaxinfer.models.params import cast_params

    backend = Backend.from_file(str(run / "tokenizer.json"))
    tokenizer = Tokenizer.from_backend(backend, eos_token_ids=(END_ID,))
    int8_rows = cfg.family != "llama"
    params = as_stored(params) if int8_rows else cast_params(params, jnp.bfloat16)
    checkpoint = Checkpoint(cfg, params, tokenizer, provenance)
    save_checkpoint(folder, checkpoint, overwrite=True, int8_rows=int8_rows)
    return params


def main(
    run_dir: Annotated[Path, typer.Option(help="Working folder, outside the repository.")],
    out: Annotated[Path | None, typer.Option(help="Model folder to write at the end.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Folder of fetched texts.")] = None,
    snapshots: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints at steps 0, 5, 10, 20, 40, ...")
    ] = None,
    source: Annotated[list[str] | None, typer.Option(help="Train on these sources only.")] = None,
    steps: Annotated[int, typer.Option(help="Updates to make.")] = 3000,
    batch: Annotated[int, typer.Option(help="Windows per update.")] = 8,
    context: Annotated[int, typer.Option(help="Positions of the model.")] = 512,
    short: Annotated[int, typer.Option(help="Tokens per window until the last eighth.")] = 256,
    width: Annotated[int, typer.Option(help="Model width, a multiple of 32.")] = 192,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 6,
    vocab: Annotated[int, typer.Option(help="Tokenizer entries.")] = 4096,
    optimizer: Annotated[
        Literal["muon", "adamw"], typer.Option(help="Both with clipping and weight decay.")
    ] = "muon",
    schedule: Annotated[
        Literal["wsd", "cosine"], typer.Option(help="Learning rate after the warm-up.")
    ] = "wsd",
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    architecture: Annotated[Architecture, typer.Option(help="Family of the model.")] = "llama",
    activation: Annotated[
        Literal["relu", "identity"] | None, typer.Option(help="Of an OPT's blocks; default: relu.")
    ] = None,
    l1: Annotated[
        float, typer.Option(help="Final weight of the L1 on an OPT's activations.", min=0)
    ] = 0.0,
    ramp: Annotated[int, typer.Option(help="Updates in which that weight grows.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of parameters and order.")] = 0,
    save_every: Annotated[int, typer.Option(help="Updates between saved states.")] = 150,
    log_every: Annotated[int, typer.Option(help="Updates between log lines.")] = 10,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows per source, about.")] = 40,
) -> None:
    """Trains a tiny model, or goes on with the run in RUN_DIR."""
    import jax
    import numpy as np

    from jaxinfer.models.params import count_params, init_params
    from jaxinfer.texts import available_sources, texts_folder
    from jaxinfer.train.data import TokenWindows
    from jaxinfer.train.language_model import next_token_loss
    from jaxinfer.train.loop import fit
    from jaxinfer.train.sparse_activations import growing_weight, sparse_next_token_loss
    from tools.data.tiny_card import write_card

    if l1 and (architecture != "opt" or activation == "identity"):
        raise typer.BadParameter(
            f"--l1 {l1:g} needs --architecture opt and its ReLU: other activations are never zero"
        )
    if activation is not None and architecture != "opt":
        raise typer.BadParameter(
            f"--activation is that of an OPT's blocks, a {architecture}'s are SwiGLU; add "
            "--architecture opt"
        )
    sources = source or [name for name in MIXTURE if name in available_sources(texts)]
    if not sources:
        raise typer.BadParameter("no texts found; run `python tools/data/fetch_texts.py` first")
    run_dir.mkdir(parents=True, exist_ok=True)
    options = {
        "architecture": architecture, "activation": activation, "l1": l1, "ramp": ramp,
        "steps": steps, "batch": batch,
        "context": context, "short": short, "width": width, "layers": layers, "vocab": vocab,
        "optimizer": optimizer, "schedule": schedule, "peak": peak, "seed": seed,
        "sources": sources, "mixture": MIXTURE,
    }  # fmt: skip
    check_options(run_dir, options)
    if snapshots is not None:
        warn_of_lost_snapshots(run_dir, snapshots, steps)
    prepare(run_dir, texts, sources, vocab)
    cfg = model_config(architecture, vocab, width, layers, context, activation or "relu")
    typer.echo(f"{count_params(cfg)} parameters, {steps * batch * short} tokens to train on")
    # Short windows are cheaper; the last eighth, at full length, teaches the far positions. Learned
    # positions know nothing of each other: there every fourth step is at full length too.
    turn = steps - steps // 8
    near = TokenWindows(run_dir / "tokens.bin", short, batch, seed)
    far = TokenWindows(run_dir / "tokens.bin", context, max(1, batch * short // context), seed)

    def batch_of(step: int):
        is_far = step >= turn or (cfg.positions == "learned" and step % 4 == 3)
        tokens = (far if is_far else near).batch(step)
        if architecture != "opt":
            return tokens
        return {"tokens": tokens, "l1": np.float32(growing_weight(step, l1, ramp))}

    def snapshot(step: int, params) -> None:
        folder = snapshot_folder(snapshots, step)
        export(folder, cfg, params, run_dir, {"step": step} | options)

    with bars() as report:
        state = fit(
            sparse_next_token_loss(cfg) if architecture == "opt" else next_token_loss(cfg),
            init_params(cfg, jax.random.key(seed)),
            transform(optimizer, schedule, peak, steps),
            batch_of,
            steps=steps,
            folder=run_dir,
            seed=seed,
            save_every=save_every,
            log_every=log_every,
            snapshots=log_spaced(steps) if snapshots else (),
            on_snapshot=snapshot if snapshots else None,
            report=report,
        )
    held_out = evaluate(cfg, state.params, run_dir, texts, eval_windows)
    write_json(run_dir / "heldout.json", held_out)
    for name, row in held_out.items():
        typer.echo(f"{name}: {row['nats_per_token']} nats/token, {row['bits_per_byte']} bits/byte")
    if out is not None:
        command = (
            f"python tools/data/train_tiny.py --run-dir DIR --out checkpoints/{out.name} "
            + " ".join(
                f"--{name} {options[name]}" for name in COMMAND_OPTIONS if options[name] is not None
            )
        )
        provenance = options | {"command": command, "held_out": held_out}
        stored = export(out, cfg, state.params, run_dir, provenance)
        manifest = (texts or texts_folder()) / "sources.json"
        manifest = read_json(manifest) if manifest.is_file() else {}
        write_card(out, run_dir, cfg, stored, manifest, command, eval_windows)
        typer.echo(f"wrote {out}")


def check_options(run: Path, options: dict) -> None:
    """Records a run's options; refuses other ones, but for `steps` before the decay has begun."""
    path = run / "options.json"
    if path.is_file():
        found = read_json(path)
        changed = [name for name in options if found.get(name) != options[name]]
        shortest = min(found["steps"], options["steps"])
        is_same_so_far = (
            options["schedule"] == "wsd"
            and shortest >= 500
            and saved_step(run) <= (1 - DECAY) * shortest
        )
        if changed and not (changed == ["steps"] and is_same_so_far):
            raise typer.BadParameter(
                f"{run} was started with other {', '.join(changed)}; use a new --run-dir"
            )
    write_json(path, options)


if __name__ == "__main__":
    typer.run(main)
