"""`convert`: any checkpoint we read, into a folder of our own format."""

import os
from pathlib import Path

from jaxinfer.files import check_destination
from jaxinfer.io.checkpoint import WHAT, Checkpoint, is_checkpoint, save_checkpoint
from jaxinfer.io.dtypes import DType
from jaxinfer.io.fetch import sha256
from jaxinfer.io.gguf_parts import part_paths
from jaxinfer.io.load import model_path
from jaxinfer.io.read import read_checkpoint
from jaxinfer.io.weights import Progress
from jaxinfer.typing import Json


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    dtype: DType = None,
    int8_rows: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the model `src` to the folder `dst` and return it.

    Args:
      src: a model-index name, a Hugging Face folder, a GGUF file or a folder of our format.
      dst: a new or empty folder, no link.
      dtype: "float32", "bfloat16" or "float16"; None is "float32".
      int8_rows: round matrices to 8 bits with a scale per row: a quarter of the bytes.
      overwrite: replace an older checkpoint of ours at `dst`; any other folder is never touched.
      progress: called as `progress(done, total)` while tensors are read.
    """
    path, folder = model_path(src), Path(os.path.expanduser(dst))
    if path.resolve() == folder.resolve():
        raise ValueError(f"source and destination are both {path}; choose another destination")
    check_destination(folder, is_checkpoint, WHAT, overwrite=overwrite)
    checkpoint = read_checkpoint(path, "float32" if dtype is None else dtype, progress)
    record = checkpoint.provenance | _hashes(path)
    save_checkpoint(
        folder,
        Checkpoint(checkpoint.config, checkpoint.params, checkpoint.tokenizer, record),
        overwrite=overwrite,
        int8_rows=int8_rows,
    )
    return folder


def _hashes(path: Path) -> Json:
    files = part_paths(path) if path.is_file() else sorted(path.glob("*.safetensors"))
    if files == [path]:
        return {"source_sha256": sha256(path)}
    return {"source_sha256": {file.name: sha256(file) for file in files}} if files else {}
