"""The card of `checkpoints/tiny-llama`, written from what its run recorded; see `train_tiny.py`."""

import hashlib
import json
from pathlib import Path
from statistics import mean

from jaxinfer.config import ModelConfig
from jaxinfer.files import read_json
from jaxinfer.models.params import count_params

CARD = """# tiny-llama

A Llama of {parameters:,} parameters that this project trained itself, on a CPU, so that every
command has a real (if very small) language model without a network. It writes English-looking text;
it knows nothing and follows no instructions. A base model: no chat template.

| | |
|---|---|
| Layers, width, MLP width | {cfg.num_layers}, {cfg.hidden_size}, {cfg.intermediate_size} (SwiGLU) |
| Query heads, key/value heads, head size | {cfg.num_heads}, {cfg.num_kv_heads}, {cfg.head_dim} |
| Context | {cfg.max_positions} tokens, RoPE theta {cfg.rope.theta:g} |
| Vocabulary | {cfg.vocab_size}, byte-level BPE of the same texts, digits split, tied embeddings |
| Stored as | bfloat16, trained in float32 |
| Training | {training} |
| Speed | {speed:,.0f} tokens/s on two busy CPU cores |
| SHA-256 of the parameters | `{digest}` |

## Data

| Source | Package | Licence of the text | Passes per epoch |
|---|---|---|---|
{sources}

Training uses only the training split of each source (`jaxinfer.texts`); of the Python
documentation, the tutorial, how-tos, FAQ and language reference (held-out pages are of all parts).

## Held-out loss

Whole documents that were never trained on and repeat no training text (`jaxinfer.texts`), in
windows of {cfg.max_positions} tokens, in float32, before the rounding to bfloat16. Each source is
cut off after about {windows} windows.

| Source | Documents | Tokens | Nats per token | Bits per byte |
|---|---|---|---|---|
{held_out}

## Made by

```
python tools/data/fetch_texts.py
{command}
```

The hash covers the parameter values (bfloat16, leaves in tree order), not the files. Another
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
    text = CARD.format(
        cfg=cfg,
        parameters=count_params(cfg),
        training=f"{steps * tokens_per_step:,} tokens in {steps:,} steps, {optimizer}, "
        f"final loss {mean(line['loss'] for line in log[-10:]):.3f} (mean of 10 steps)",
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
