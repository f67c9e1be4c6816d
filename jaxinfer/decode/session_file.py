"""The file of a session: the leaves of its cache and the tokens that they hold, as safetensors."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import path_text, whole
from jaxinfer.arrays import ArrayFile, check_finite, opened
from jaxinfer.cache.policy import Cache
from jaxinfer.cache.slots import Slots
from jaxinfer.decode.capacity import is_fixed_size
from jaxinfer.decode.engine import SMALLEST_CAPACITY, bucket
from jaxinfer.decode.prefix import Own, Prefix
from jaxinfer.files import one_line, parse_json, quoted, replacing
from jaxinfer.models.fingerprint import identity

FORMAT = "jaxinfer-session-1"
DENSE = "none"
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

    path = Path(path_text("path", path))
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
    """An empty prefix of the same model, policy and sparsity, filled with what `save` wrote.

    Raises:
      ValueError: the file is missing, damaged, or of another model, policy or sparsity.
    """
    path = Path(path_text("path", path))
    try:
        with opened(path) as file:
            theirs = {"sparsity": DENSE} | file.metadata  # older files name none
            for name, mine in _identity(prefix).items():
                if theirs.get(name) != mine:
                    raise ValueError(
                        f"it has {name} {quoted(theirs.get(name), 200)}, this model and policy "
                        f"have {quoted(mine, 200)}; restore it with what saved it"
                    )
            tokens, pending, capacity = _state(prefix, file.metadata.get("state", ""))
            prefix.capacity = capacity
            cache = _filled(prefix, file)
        if cache.length.tolist() != [len(tokens)]:
            raise ValueError(f"its cache holds {cache.length.tolist()} tokens, not {len(tokens)}")
    except ValueError as error:
        raise ValueError(
            f"cannot read session file {one_line(path, 300)}: {one_line(error, 600)}"
        ) from error
    prefix.put_back(cache, tokens, pending)
    return prefix


def _is_session(path: Path) -> bool:
    """Whether a file is empty or was written by `save`, of whatever model or release."""
    with open(path, "rb") as file:
        start = file.read(LONGEST_HEADER)
    return not start or b'"format":"jaxinfer-session-' in start


def _state(prefix: Prefix, text: str) -> tuple[list[int], list[int], int]:
    """Tokens in the cache, tokens not yet there, and the room of the cache."""
    state = parse_json(text, "its state")
    if not isinstance(state, dict) or set(state) != {"tokens", "pending", "capacity"}:
        raise ValueError("its state must have tokens, pending and capacity, and nothing else")
    tokens, pending = state["tokens"], state["pending"]
    for name, ids in (("tokens", tokens), ("pending", pending)):
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError(f"its {name} must be a list of token ids")
    prefix.model.encode(tokens + pending, continues=True)
    capacity = whole("its capacity", state["capacity"], least=SMALLEST_CAPACITY)
    if capacity != bucket(capacity, SMALLEST_CAPACITY):
        raise ValueError(f"its capacity is {capacity}, which no session has")
    if not is_fixed_size(prefix.model, prefix.policy) and len(tokens) > capacity:
        raise ValueError(f"it has {len(tokens)} tokens in a cache for {capacity}")
    return tokens, pending, capacity


def _filled(prefix: Prefix, file: ArrayFile) -> Cache:
    """A cache of the prefix's capacity with the file's leaves."""
    new = partial(prefix.engine.new_cache, prefix.policy, 1, prefix.capacity)
    leaves, tree = jax.tree_util.tree_flatten_with_path(jax.eval_shape(new))
    file.check_names([str(i) for i in range(len(leaves))])
    filled = []
    for i, (place, leaf) in enumerate(leaves):
        stored = file.read(str(i), leaf.shape, _file_dtype(leaf.dtype)).view(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            # an empty slot of H2O has weight -inf
            empty = (
                np.isneginf(stored)
                if jax.tree_util.keystr(place).endswith("attn_weight")
                else False
            )
            check_finite(np.where(empty, 0, stored), f"array {i}")
        filled.append(jnp.asarray(stored))
    cache = jax.tree.unflatten(tree, filled)
    for slots in jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, Slots)):
        if isinstance(slots, Slots) and slots.budget is not None:
            budget = int(slots.budget[0])
            if not 1 <= budget <= slots.capacity:
                raise ValueError(f"it has a budget of {budget} tokens in {slots.capacity} slots")
    return cache


def _identity(prefix: Prefix) -> dict[str, str]:
    """What must agree between saving and restoring."""
    model = prefix.model
    described = None if model.sparsity is None else model.sparsity.describe()
    return {
        "format": FORMAT,
        "sparsity": DENSE if described is None else json.dumps(described, sort_keys=True),
        "model": identity(model.config, model.params),
        "policy": repr(prefix.policy),
        "dtype": model.engine.dtype,
        "layout": prefix.engine.backend.layout,
    }


def _file_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in files: numpy's reader does not know bfloat16, so its bits are kept."""
    return np.dtype(np.uint16 if dtype == jnp.bfloat16 else dtype)
