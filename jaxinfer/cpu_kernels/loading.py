"""The compiled library of CPU kernels: where it is, whether it may be used, and who computes.

The library is opened once, when kernels are first asked for. Whatever is wrong with it becomes one
line, XLA computes instead, and nothing of a damaged file is ever run: a file that does not fit its
manifest is not opened.

`JAXINFER_CPU_KERNELS=0` turns the kernels off, the name of an instruction set chooses it.
`JAXINFER_CPU_LIBRARY` names the folder of another build, of the same sources.
"""

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxinfer.cpu_kernels.manifest import LIBRARY, MANIFEST, digest_of, digest_of_sources
from jaxinfer.files import one_line, quoted, read_json

FOLDER = Path(__file__).parent / "library"
HANDLERS = ("jaxinfer_int8_product", "jaxinfer_listed_mlp")
SWITCH, PLACE = "JAXINFER_CPU_KERNELS", "JAXINFER_CPU_LIBRARY"
ON, OFF = ("", "1"), "0"
BUILD = "`pip install` builds them where there is a C++ compiler"

_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class State:
    """`library` is None where XLA computes; `reason` says in one line why it does, or with which
    instructions the kernels do. `is_wanted` is False where the user turned them off."""

    library: Any
    reason: str
    is_wanted: bool = True


def available() -> bool:
    """Whether CPU kernels can compute."""
    return state().library is not None


def state() -> State:
    """The library, opened at the first call.

    Raises:
      ValueError: `JAXINFER_CPU_KERNELS` is no instruction set that this CPU has.
    """
    with _lock:
        return _opened()


def require() -> None:
    """Raises, with the reason, where CPU kernels cannot compute."""
    found = state()
    if found.library is None:
        raise ValueError(f"implementation='ffi' needs the CPU kernels: {found.reason}")


def instruction_sets() -> tuple[str, ...]:
    """Those that kernels were compiled for and this CPU has, best first; none without a library."""
    library = state().library
    return () if library is None else _names(library)


def choose(name: str) -> None:
    """Makes the kernels of an instruction set compute, of those in `instruction_sets`."""
    if not state().library.jaxinfer_cpu_choose(name.encode()):
        raise ValueError(f"instruction set must be one of {instruction_sets()}, got {quoted(name)}")


def limit_threads(most: int) -> None:
    """Threads that share a call; 0 takes all of XLA's."""
    state().library.jaxinfer_cpu_limit_threads(most)


@functools.cache
def say_once_if_missing() -> None:
    """A warning where XLA computes though nobody turned the kernels off."""
    found = state()
    if found.library is None and found.is_wanted:
        warnings.warn(f"XLA computes without CPU kernels: {found.reason}", stacklevel=3)


@functools.cache
def _opened() -> State:
    switch = os.environ.get(SWITCH, "")
    if switch == OFF:
        return State(library=None, reason=f"turned off by {SWITCH}=0", is_wanted=False)
    folder = Path(os.environ.get(PLACE) or FOLDER)
    try:
        library = _open(folder)
    except (OSError, ValueError, AttributeError, jax.errors.JaxRuntimeError) as error:
        return State(library=None, reason=one_line(error))
    names = _names(library)
    if switch not in (*ON, *names):
        raise ValueError(
            f"{SWITCH} must be 0, 1 or an instruction set of this CPU, {', '.join(names)}; got "
            f"{quoted(switch)}"
        )
    if switch in names:
        library.jaxinfer_cpu_choose(switch.encode())
    return State(library=library, reason=switch if switch in names else names[0])


def _open(folder: Path) -> Any:
    path = folder / LIBRARY
    if not path.is_file():
        raise ValueError(f"they are not built; {BUILD}")
    manifest = read_json(folder / MANIFEST, 10_000)
    if manifest.get("library") != digest_of(path):
        raise ValueError(f"the file {LIBRARY} is damaged; {BUILD}")
    if manifest.get("sources") != digest_of_sources():
        raise ValueError(f"they were built from other sources; {BUILD}")
    library = ctypes.CDLL(str(path))
    library.jaxinfer_cpu_target.restype = ctypes.c_char_p
    library.jaxinfer_cpu_choose.restype = ctypes.c_bool
    handlers: list[Callable[..., Any]] = [getattr(library, name) for name in HANDLERS]
    for name, handler in zip(HANDLERS, handlers, strict=True):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return library


def _names(library: Any) -> tuple[str, ...]:
    found = []
    while (name := library.jaxinfer_cpu_target(len(found))) is not None:
        found.append(name.decode())
    return tuple(found)
