"""`load`: a model from its name, a Hugging Face folder, a GGUF file, or our own folder."""

import os
from pathlib import Path

from jaxinfer.io.load import load_checkpoint
from jaxinfer.io.weights import Progress
from jaxinfer.lm import LM
from jaxinfer.models.quantize import check_format, quantize_params
from pallas_kernels.dispatch import Implementation


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    weights: str | None = None,
    implementation: Implementation | None = None,
    progress: Progress | None = None,
) -> LM:
    """An `LM` from a model-index name, a Hugging Face folder, a GGUF file or our own folder.

    Args:
      source: a name such as "smollm2-135m" (fetched once, then kept), or a path.
      dtype: "float32", "bfloat16" or "float16"; None is float32 on CPU, bfloat16 on a GPU.
      weights: "int8" or "int4" stores the weights of layers and head in so many bits; norms, biases
        and all arithmetic keep `dtype`. On a CPU "int8" is for speed (activations are rounded to 8
        bits too) and "int4" for memory alone. The floating weights are in memory until then.
      implementation: of what a decode step computes, see `LM`; None takes Pallas kernels on a GPU.
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
    checkpoint = load_checkpoint(source, dtype, progress)
    params = checkpoint.params
    if weights is not None:
        params = quantize_params(
            checkpoint.config,
            params,
            weights,
            tokenizer=checkpoint.tokenizer,
            implementation=implementation,
        )
    name = Path(source).name if os.path.exists(source) else str(source)
    return LM(checkpoint.config, params, checkpoint.tokenizer, name, implementation)
