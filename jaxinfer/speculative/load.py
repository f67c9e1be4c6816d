"""`load_draft`: what can guess ahead for a target, by name."""

from pathlib import Path
from typing import Any

from jaxinfer.io.draft import is_draft
from jaxinfer.io.draft import load_draft as load_borrowing
from jaxinfer.io.model_index import FolderModel, committed_folder
from jaxinfer.lm import LM
from jaxinfer.loading import load
from jaxinfer.models.quantize import quantize_params, quantize_weights
from jaxinfer.nn.quantized import size_of
from jaxinfer.speculative.recurrent import RecurrentConfig, RecurrentDraft
from jaxinfer.speculative.speculate import PROMPT_LOOKUP, early_exit

DRAFTS = {name: f"checkpoints/{name}" for name in ("draft-smollm2-135m", "draft-tiny-llama")}
"""Drafts that come with the library and borrow their target's embedding and head, by name."""

FEW = 6_000_000  # XLA CPU: 5.0 million alike, 9.3 million slower in full, 0.7 million much faster


def load_draft(target: LM, source: str, **options: Any) -> "LM | RecurrentDraft | str":
    """A draft for `speculate`: "prompt-lookup"; "exit:N", the target's first N layers; a trained
    draft, by its name or folder; or any other model, as in `load`.

    `options` are those of `load`; a trained draft has the target's dtype. A recurrent one of up to
    `FEW` weights keeps them in full under `weights`: a CPU is no faster in fewer bits.

    Raises:
      ValueError: an unknown name, or a trained draft of another target.
    """
    if source == PROMPT_LOOKUP:
        return source
    kind, colon, layers = source.partition(":")
    if kind == "exit" and colon:
        if not layers.isdigit():
            raise ValueError(f"a draft exit:N has a number of layers, got {source!r}")
        return early_exit(target, int(layers))
    folder = committed_folder(FolderModel(DRAFTS[source])) if source in DRAFTS else source
    if not is_draft(folder):
        return load(source, **options)
    found, name = load_borrowing(folder, target.params), Path(folder).name
    params, weights = found.full_params(target.params), options.get("weights")
    if isinstance(found.config, RecurrentConfig):
        own = {key: value for key, value in params.items() if key != "embed"}
        if weights is not None and size_of(own) > FEW:
            params = quantize_weights(params, weights, target.implementation)
        return RecurrentDraft(found.config, params, name)
    if weights is not None:
        params = quantize_params(
            found.config, params, weights, tokenizer=target.tokenizer,
            implementation=target.implementation,
        )  # fmt: skip
    return LM(found.config, params, target.tokenizer, name, target.implementation)
