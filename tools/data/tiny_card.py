"""The card of a small committed model, written from what its run recorded; see `train_tiny.py`."""

import hashlib
import json
from pathlib import Path
from statistics import mean

from jaxinfer.config import ModelConfig
from jaxinfer.files import read_json
from jaxinfer.models.params import count_params

PURPOSE = {
    "llama": """\
A Llama of {parameters:,} parameters that this project trained itself, on a CPU, so that every
command has a real (if very small) language model without a network. It writes English-looking text;
it knows nothing and follows no instructions. A base model: no chat template.""",
    "opt": """\
An OPT of {parameters:,} parameters that this project trained itself, on a CPU, for methods that
read only some neurons of a ReLU block. It writes English-looking text; it knows nothing and follows
no instructions. A base model: no chat template. It reads and writes at most {context} tokens, as
its positions are learned.""",
    "hyena": """\
A {name} of {parameters:,} parameters that this project trained itself, on a CPU, for methods that
turn long convolutions into recurrences: tiny-llama with other mixers, on the same texts. It writes
English-looking text; it knows nothing and follows no instructions. A base model: no chat template.
Its filters, and so its texts, end at {context} tokens.""",
}
BLOCKS = {"relu": "ReLU", "identity": "no nonlinearity"}
CARD = """# {name}

{purpose}

| | |
|---|---|
| Layers, width, MLP width | {cfg.num_layers}, {cfg.hidden_size}, {mlp} |
| {mixer} |
| Context | {cfg.max_positions} tokens, {positions} |
| Vocabulary | {cfg.vocab_size}, byte-level BPE of the same texts, digits split, tied embeddings |
| Stored as | {stored}, trained in float32 |
| Training | {training} |
{density}| Speed | {speed:,.0f} tokens/s on two busy CPU cores |
| SHA-256 of the parameters | `{digest}` |

## Data

| Source | Package | Licence of the text | Passes per epoch |
|---|---|---|---|
{sources}

Training uses only the training split of each source (`jaxinfer.texts`); of the Python
documentation, the tutorial, how-tos, FAQ and language reference (held-out pages are of all parts).

## Held-out loss

Whole documents that were never trained on and repeat no training text (`jaxinfer.texts`), in
windows of {cfg.max_positions} tokens, in float32, before the parameters were rounded. Each source
is cut off after about {windows} windows.

| Source | Documents | Tokens | Nats per token | Bits per byte |
|---|---|---|---|---|
{held_out}

## Made by

```
python tools/data/fetch_texts.py
{command}
```

The hash covers the parameter values ({hashed}, leaves in tree order), not the files. Another
machine or release of JAX rounds differently and gives another, equally good, model.
"""


def parameters_digest(params) -> str:
    """SHA-256 over the leaves' bytes in tree order."""
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def write_card(
    folder: Path, run: Path, cfg: ModelConfig, params, manifest: dict, command: str, windows: int
) -> None:
    """Writes `folder/README.md`; `params` are the stored ones and `manifest` is `sources.json`."""
    options = read_json(run / "options.json")
    held_out = read_json(run / "heldout.json")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    speed = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    steps, tokens_per_step = options["steps"], options["batch"] * options["short"]
    optimizer = {"muon": "Muon", "adamw": "AdamW"}[options["optimizer"]]
    sources = []
    for name in options["sources"]:
        entry = {"package": "?", "version": "?", "licence": "?"} | manifest.get(name, {})
        package, passes = f"{entry['package']} {entry['version']}", options["mixture"].get(name, 1)
        sources.append(f"| {name} | {package} | {entry['licence']} | {passes} |")
    rows = [
        f"| {name} | {row['documents']} | {row['tokens']:,} | {row['nats_per_token']:.3f} "
        f"| {row['bits_per_byte']:.3f} |"
        for name, row in held_out.items()
    ]
    l1 = options["l1"]
    in_rows, kind = cfg.family != "llama", "Hyena"
    sizes = f"{cfg.num_heads}, {cfg.num_kv_heads}, {cfg.head_dim}"
    mixer, positions = f"Query heads, key/value heads, head size | {sizes}", "learned positions"
    if cfg.hyena is not None:
        kind = "Hyena" if cfg.hyena.head_size == 1 else "MultiHyena"
        count, head = cfg.hyena.filters(cfg.hidden_size), cfg.hyena.head_size
        mixer = f"Long filters of a layer, channels under each | {count}, {head}"
        positions = "no positions but the filters' lags"
    elif cfg.rope is not None:
        positions = f"RoPE theta {cfg.rope.theta:g}"
    final = mean(line.get("nats", line["loss"]) for line in log[-10:])
    training = (
        f"{steps * tokens_per_step:,} tokens in {steps:,} steps, {optimizer}, "
        f"final loss {final:.3f} (mean of the last 10 logged steps)"
    )
    if l1:
        training += f", L1 on activations growing to {l1:g} within {options['ramp']} steps"
    layers = zip(*(row["density"] for row in held_out.values() if "density" in row), strict=True)
    density = ", ".join(f"{100 * mean(shares):.1f}" for shares in layers)
    text = CARD.format(
        cfg=cfg,
        name=folder.name,
        purpose=PURPOSE[cfg.family].format(
            name=kind, parameters=count_params(cfg), context=cfg.max_positions
        ),
        mixer=mixer,
        mlp=f"{cfg.intermediate_size} ({BLOCKS.get(cfg.activation, 'SwiGLU')})",
        positions=positions,
        stored="int8 rows (vectors and filters in float32)" if in_rows else "bfloat16",
        hashed="float32 as loaded" if in_rows else "bfloat16",
        density=f"| Active neurons per layer, held-out, % | {density} |\n" if density else "",
        training=training,
        speed=tokens_per_step
        * sum(line["steps"] for line in speed)
        / sum(line["seconds"] for line in speed),
        digest=parameters_digest(params),
        sources="\n".join(sources),
        held_out="\n".join(rows),
        command=command,
        windows=windows,
    )
    (folder / "README.md").write_text(text)
