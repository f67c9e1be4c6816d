"""XLA's persistent compilation cache, switched on by the programs a user runs (never at import).

A decode program of 30 unrolled layers takes seconds to compile and then loads from disk in a
fraction of that. jax stores only compilations of a second or more unless told otherwise; this
stores all.
"""

import os
from pathlib import Path

import jax

from jaxinfer.files import cache_folder

CACHE_DIR = "jax_compilation_cache_dir"
MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
MIN_BYTES = "jax_persistent_cache_min_entry_size_bytes"


def enable_persistent_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder in use; a cache that the user configured stays as it is.

    None when the folder cannot be written: compiling every time is slower, but not an error.
    """
    configured = getattr(jax.config, CACHE_DIR)
    if configured:
        return Path(configured)
    path = Path(os.path.expanduser(folder)) if folder is not None else cache_folder() / "xla"
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return None
    _set_unless_given(MIN_SECONDS, 0.0)
    _set_unless_given(MIN_BYTES, -1)
    jax.config.update(CACHE_DIR, str(path))
    _forget_disabled_cache()
    return path


def _set_unless_given(name: str, value: int | float) -> None:
    if name.upper() not in os.environ:
        jax.config.update(name, value)


def _forget_disabled_cache() -> None:
    """jax decides at its first compilation whether there is a cache; make it decide again."""
    try:
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()
    except (ImportError, AttributeError):  # an older or newer jax: works when called early
        pass
