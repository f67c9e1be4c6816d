"""`load` and `load_draft`: models, and what guesses ahead for them, by name or path."""

import os
import reprlib
from pathlib import Path

from jaxinfer.arguments import of_kind, path_text, shown
from jaxinfer.io.draft import is_draft, read_draft
from jaxinfer.io.dtypes import DType
from jaxinfer.io.load import load_checkpoint, source_text
from jaxinfer.io.model_index import MODELS, FolderModel, committed_folder
from jaxinfer.io.weights import Progress
from jaxinfer.lm import LM
from jaxinfer.models.filter_form import FilterForms, with_filters
from jaxinfer.models.quantize import check_format, quantize_params, quantize_weights
from jaxinfer.models.recurrent import RecurrentConfig, RecurrentDraft
from jaxinfer.names import SparsityLike, sparsity_of
from jaxinfer.nn.quantized import size_of
from jaxinfer.plugins import meant
from jaxinfer.runtime.backend import Backend, Implementation, check_implementation
from jaxinfer.speculative.drafts import PROMPT_LOOKUP, early_exit

DRAFTS = {name: f"checkpoints/{name}" for name in ("draft-smollm2-135m", "draft-tiny-llama")}
"""Drafts that come with the library and borrow their target's embedding and head, by name."""

FEW = 6_000_000  # XLA CPU: 5.0 million alike, 9.3 million slower in full, 0.7 million much faster


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DType = None,
    weights: str | None = None,
    implementation: Implementation | None = None,
    sparsity: SparsityLike = None,
    filters: FilterForms = None,
    progress: Progress | None = None,
) -> LM:
    """An `LM` from a model-index name, a Hugging Face folder, a GGUF file or our own folder.

    Args:
      source: a name such as "smollm2-135m" (fetched once, then kept), or a path.
      dtype: "float32", "bfloat16" or "float16"; None is float32 on CPU, bfloat16 on a GPU.
      weights: "int8" or "int4" stores the weights of layers and head in so many bits; norms, biases
        and all arithmetic keep `dtype`. On a CPU "int8" is for speed (activations are rounded to 8
        bits too) and "int4" for memory alone. The floating weights are in memory until then.
      implementation: of what a decode step computes, see `LM`; None takes Pallas kernels on a GPU
        and those of `jaxinfer.cpu_kernels` on a CPU.
      sparsity: makes the blocks sparse as `LM.sparsified` does, before `weights` stores them; there
        is no dense model then.
      filters: of a distilled model of long convolutions, "modal" computes by its modes in constant
        memory, as None does, and "exact" by the filters that they were made from; "tiled" and
        "epoched" do so too, for long texts in less time and without drafts; or a list with one for
        each layer.
      progress: called as `progress(done, total)` while parameters are read.

    Returns:
      The model with its tokenizer, if the source has one.

    Raises:
      ValueError: one line on what is wrong with the source and what to do.
      ModelUnavailable: a named model could not be fetched.

    Example:
      >>> lm = load("tiny-llama")
      >>> lm.name, lm.config.num_layers
      ('tiny-llama', 6)
    """
    if weights is not None:
        check_format(weights)  # before gigabytes are read
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function of (done, total), got {shown(progress)}")
    check_implementation(implementation)
    source = source_text(source)
    name = Path(source).name if os.path.exists(source) else source
    method = sparsity_of(sparsity, name)
    checkpoint = load_checkpoint(source, dtype, progress)
    config, params = with_filters(checkpoint.config, checkpoint.params, filters)
    if method is not None:
        params = method.apply(config, params)
    if weights is not None:
        params = quantize_params(
            config,
            params,
            weights,
            tokenizer=checkpoint.tokenizer,
            backend=Backend.of(implementation),
        )
    return LM(config, params, checkpoint.tokenizer, name, implementation, method)


def load_draft(
    target: LM,
    source: str,
    *,
    dtype: DType = None,
    weights: str | None = None,
    implementation: Implementation | None = None,
    progress: Progress | None = None,
) -> LM | RecurrentDraft | str:
    """What can guess ahead for `target`, by name: the `draft` of `speculate`.

    Args:
      target: the model whose text is wanted.
      source: "prompt-lookup"; "exit:N", the target's first N layers; a trained draft, by its name
        ("draft-smollm2-135m") or folder; or any other model, as in `load`.
      dtype: as in `load`; a trained draft and an early exit have the target's.
      weights: as in `load`, but not for an early exit. A recurrent draft of up to `FEW` weights
        keeps them in full: a CPU is no faster in fewer bits.
      implementation: as in `load`; a trained draft and an early exit have the target's.
      progress: as in `load`.

    Returns:
      A model, a recurrent draft, or "prompt-lookup" itself.

    Raises:
      ValueError: an unknown name, or a trained draft of another target.

    Example:
      >>> lm = load("tiny-llama")
      >>> load_draft(lm, "exit:2").config.num_layers
      2
    """
    of_kind("target", target, LM, "an LM")
    known = [PROMPT_LOOKUP, "exit:N", *DRAFTS, *MODELS]
    source = path_text(f"a draft (one of {', '.join(known)}, or a file or folder)", source)
    if source == PROMPT_LOOKUP:
        return source
    kind, colon, layers = source.partition(":")
    if kind == "exit" and colon:
        if not (layers.isdecimal() and len(layers) < 6):
            raise ValueError(f"a draft exit:N has a number of layers, got {shown(source)}")
        return early_exit(target, int(layers))
    folder = committed_folder(FolderModel(DRAFTS[source])) if source in DRAFTS else source
    if is_draft(folder):
        return _load_trained(target, Path(folder), weights)
    if source not in MODELS and not os.path.exists(os.path.expanduser(source)):
        raise ValueError(
            f"no draft {reprlib.repr(source)}{meant(source, known)} drafts are "
            f"{', '.join(known)}, or the folder or file of one"
        )
    return load(
        source, dtype=dtype, weights=weights, implementation=implementation, progress=progress
    )


def _load_trained(target: LM, folder: Path, weights: str | None) -> LM | RecurrentDraft:
    """A draft that borrows the target's embedding and head."""
    found = read_draft(folder, target.params)
    params = found.full_params(target.params)
    if isinstance(found.config, RecurrentConfig):
        own = {key: value for key, value in params.items() if key != "embed"}
        if weights is not None and size_of(own) > FEW:
            params = quantize_weights(params, weights, target.engine.backend)
        return RecurrentDraft(found.config, params, folder.name)
    if weights is not None:
        params = quantize_params(
            found.config, params, weights, tokenizer=target.tokenizer,
            backend=target.engine.backend,
        )  # fmt: skip
    return LM(found.config, params, target.tokenizer, folder.name, target.implementation)
