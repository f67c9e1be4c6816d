"""The file of a session: the leaves of its cache and the tokens that they hold, as safetensors."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.policy import Cache
from jaxinfer.decode.prefix import Own, Prefix
from jaxinfer.files import one_line, replacing
from jaxinfer.models.fingerprint import identity

FORMAT = "jaxinfer-session-1"
LONGEST_HEADER = 2**25  # bytes in which a session's file says what it is, all its tokens included


def save(prefix: Prefix, path: str | Path) -> None:
    """Writes tokens and cache to one file, which appears whole or not at all.

    A session that is there is replaced: a conversation is saved again and again. Nothing else is.

    Raises:
      ValueError: the folder of `path` is missing, or something else than a session is there.
      OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent} is not a folder; save {path.name!r} elsewhere")
    if path.is_file() and not _is_session(path):
        raise ValueError(f"{path} exists and is not a session; choose another file")
    leaves = [np.asarray(x) for x in jax.tree.leaves(prefix.cache)]  # ends a stream: first
    arrays = {str(i): x.view(_file_dtype(x.dtype)) for i, x in enumerate(leaves)}
    state = {"tokens": prefix.tokens, "pending": prefix.pending, "capacity": prefix.capacity}
    meta = _identity(prefix) | {"state": json.dumps(state)}
    try:
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata=meta)
    except SafetensorError as error:  # whatever the system said, in words
        raise OSError(f"cannot write {path}: {one_line(error)}") from error


def restore(prefix: Own, path: str | Path) -> Own:
    """An empty prefix of the same model and policy, filled with what `save` wrote.

    Raises:
      ValueError: the file is missing, damaged, or of another model or policy.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            for name, mine in _identity(prefix).items():
                if meta.get(name) != mine:
                    raise ValueError(
                        f"it has {name} {meta.get(name)!r}, this model and policy have "
                        f"{mine!r}; restore it with what saved it"
                    )
            state = json.loads(meta["state"])
            tokens, pending = list(state["tokens"]), list(state["pending"])
            prefix.capacity = int(state["capacity"])
            prefix.model.encode(tokens + pending, continues=True)
            arrays = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        cache = _filled(prefix, arrays)
        if cache.length.tolist() != [len(tokens)]:
            raise ValueError(f"its cache holds {cache.length} tokens, not {len(tokens)}")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"cannot read session file {path}: {error}") from None
    prefix.put_back(cache, tokens, pending)
    return prefix


def _is_session(path: Path) -> bool:
    """Whether a file is empty or was written by `save`, of whatever model or release."""
    with open(path, "rb") as file:
        start = file.read(LONGEST_HEADER)
    return not start or b'"format":"jaxinfer-session-' in start


def _filled(prefix: Prefix, arrays: list[np.ndarray]) -> Cache:
    """A cache of the prefix's capacity with these leaves."""
    new = partial(prefix.engine.new_cache, prefix.policy, 1, prefix.capacity)
    leaves, tree = jax.tree.flatten(jax.eval_shape(new))
    expected = [(leaf.shape, _file_dtype(leaf.dtype)) for leaf in leaves]
    if expected != [(x.shape, x.dtype) for x in arrays]:
        raise ValueError("its arrays are not those of such a cache")
    filled = [jnp.asarray(x.view(leaf.dtype)) for x, leaf in zip(arrays, leaves, strict=True)]
    return jax.tree.unflatten(tree, filled)


def _identity(prefix: Prefix) -> dict[str, str]:
    """What must agree between saving and restoring."""
    model = prefix.model
    return {
        "format": FORMAT,
        "model": identity(model.config, model.params),
        "policy": repr(prefix.policy),
        "dtype": model.engine.dtype,
        "layout": prefix.engine.backend.layout,
    }


def _file_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in files: numpy's reader does not know bfloat16, so its bits are kept."""
    return np.dtype(np.uint16 if dtype == jnp.bfloat16 else dtype)
