"""Saving and restoring a parameter tree in Orbax's format.

Orbax writes the tree, uncompressed and one folder an array (weights do not compress). Reading opens
the arrays with Orbax's own storage engine, TensorStore, and fills aligned buffers that JAX borrows:
the 538 MB of SmolLM2 take 0.4 s and no second copy, against 1.5 s and two copies with Orbax's
restore (2 cores, warm files). Shapes and dtypes are checked against the config before anything is
read; a missing chunk is an error, never zeros.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.files import one_line
from jaxinfer.io.weights import aligned_empty, parameter_shapes, place
from jaxinfer.models.params import leaf_name
from jaxinfer.typing import Params


def tree_dtype(params: Params) -> str:
    """The one dtype name of all leaves."""
    names = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    if len(names) != 1:
        raise ValueError(f"parameters must share one dtype, got {sorted(names)}")
    return names.pop()


def save_params(folder: Path, params: Params) -> None:
    """Write `params` below `folder`, which must not exist."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(params))
    marker = folder / "commit_success.txt"
    if marker.is_file():  # it names the folder of this machine, which is nobody's business
        marker.write_text("Checkpoint commit was successful\n")


def load_params(folder: Path, cfg: ModelConfig, stored: np.dtype, dtype: np.dtype) -> Params:
    """The parameters of `cfg`, cast from `stored` to `dtype`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; the checkpoint is damaged, convert the model again")
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameter_shapes(cfg, dtype))
    # every array is opened and compared first: a wrong config must not allocate its sizes
    stores = [_open(folder, name, leaf.shape, stored) for name, leaf in _named(leaves)]
    arrays = []
    for (name, leaf), store in zip(_named(leaves), stores, strict=True):
        buffer = aligned_empty(leaf.shape, stored)
        with _damage(folder, name):
            _read_into(store, folder / name, buffer)
        if dtype != stored:
            cast = aligned_empty(leaf.shape, dtype)
            with np.errstate(over="ignore"):
                cast[...] = buffer
            if dtype.name == "float16" and not np.isfinite(cast).all():
                raise ValueError(
                    f"{folder}: {name} does not fit float16; load it as float32 or bfloat16"
                )
            buffer = cast
        arrays.append(place(buffer))
    return jax.tree.unflatten(tree, arrays)


def _named(leaves: list) -> Iterator[tuple[str, Any]]:
    """Orbax's names of the arrays: the path joined by dots."""
    for path, leaf in leaves:
        yield leaf_name(path), leaf


def _open(folder: Path, name: str, shape: tuple[int, ...], stored: np.dtype) -> Any:
    import tensorstore

    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str((folder / name).absolute()) + "/"},
        "fill_missing_data_reads": False,
    }
    with _damage(folder, name):
        store = tensorstore.open(spec, open=True, read=True).result()
    if tuple(store.shape) != shape or store.dtype.name != stored.name:
        raise ValueError(
            f"{folder}: {name} is {store.dtype.name}{list(store.shape)}, config.json says "
            f"{stored.name}{list(shape)}; the checkpoint is damaged, convert the model again"
        )
    return store


def _read_into(store: Any, folder: Path, buffer: np.ndarray) -> None:
    import tensorstore

    metadata = store.spec().to_json()["metadata"]
    plain = {"order": "C", "chunks": metadata["shape"], "dimension_separator": "."}
    plain |= {"compressor": None, "filters": None}
    native = metadata["dtype"] in ("<f4", "<f2", "bfloat16")
    if not native or any(metadata.get(key) != value for key, value in plain.items()):
        tensorstore.array(buffer).write(store).result()
        return
    # one uncompressed chunk is the array's own bytes: half the time of reading through the engine
    path = folder / ".".join("0" * buffer.ndim)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size != buffer.nbytes:
            raise ValueError(f"its file has {size} bytes, expected {buffer.nbytes}")
        view, done = buffer.reshape(-1).view(np.uint8).data, 0
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"its file ends at byte {done}")
            done += count


@contextlib.contextmanager
def _damage(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # TensorStore reports damage as ValueError, KeyError or its own kinds of RuntimeError
        raise ValueError(
            f"{folder}: cannot read {name} ({one_line(error, 160)}); the checkpoint is damaged, "
            "convert the model again"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax's notes about its own settings off the user's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
