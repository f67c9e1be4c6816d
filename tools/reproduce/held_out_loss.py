"""Loss of a language model on the held-out documents of every source, in nats per token and bits
per byte.

    python tools/reproduce/held_out_loss.py [--model tiny-llama --windows 40]

Whole documents that no model of this project was trained on and that repeat no training text
(`jaxinfer.texts`), in windows of the model's context, with the parameters as they are stored,
computed in float32. A ReLU model's rows also tell each layer's density: the share of its neurons
that are active. Writes `held-out-MODEL`.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.reproduce.figures import publish


def main(
    model: Annotated[str, typer.Option(help="Model name or folder.")] = "tiny-llama",
    windows: Annotated[int, typer.Option(help="Windows per source, about.")] = 40,
) -> None:
    """Writes the table of losses by source."""
    import jaxinfer as ji
    from jaxinfer.eval.tables import Row
    from jaxinfer.texts import available_sources, read_source
    from jaxinfer.train.language_model import held_out_loss
    from jaxinfer.train.sparse_activations import held_out_density

    lm, table = ji.load(model, dtype="float32"), []
    for source in available_sources():
        documents = [
            (lm.encode(document.text, continues=True), len(document.text.encode()))
            for document in read_source(source, "heldout")
        ]
        cut = {
            "length": lm.config.max_positions,
            "end": lm.config.eos_token_ids[0],
            "max_windows": windows,
        }
        loss = held_out_loss(lm.config, lm.params, documents, **cut)
        metrics = {
            "documents": loss.documents,
            "tokens": loss.tokens,
            "nats_per_token": loss.nats_per_token,
            "bits_per_byte": loss.bits_per_byte,
        }
        if lm.config.activation == "relu":
            shares = held_out_density(lm.config, lm.params, documents, **cut)
            metrics |= {f"density_{layer}": float(share) for layer, share in enumerate(shares)}
        table.append(Row(source, "full", 0, 1.0, metrics))
        typer.echo(f"{source}: {loss.nats_per_token:.3f} nats per token", err=True)

    def plot(axes) -> None:
        names = [row.label for row in table]
        bars = axes.barh(names[::-1], [row.metrics["bits_per_byte"] for row in table][::-1])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set_xlabel("bits per byte")

    command = f"python tools/reproduce/held_out_loss.py --model {model} --windows {windows}"
    config = {"model": lm.name, "context": lm.config.max_positions, "windows": windows}
    title = f"Held-out loss of {lm.name} by source"
    publish(f"held-out-{lm.name}", title, config, table, plot, seed=0, command=command)


if __name__ == "__main__":
    typer.run(main)
