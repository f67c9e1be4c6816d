"""Compiles for a GPU that this machine does not have, with the GPU compiler itself.

XLA:GPU is a CPU program. Given a description of the device (`targets/h200.txt`) it turns a whole
decode step into machine code, so copies, fusions, temporaries and register spills can be read from
it where no GPU is: in tests and by `jaxinfer info --target h200`. It needs `jax-cuda13-pjrt` of
jax's own version (installed with `--no-deps`) and the CUDA toolkit's libdevice. Computations on the
CPU go on in the same process.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxinfer.runtime.program import Program

TARGETS = Path(__file__).parent / "targets"
SPILLS_ARE_ERRORS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_SKIP_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


def available() -> bool:
    """Whether this machine can compile for a GPU; `unavailable_reason` says why not."""
    return unavailable_reason() is None


@functools.lru_cache(maxsize=1)
def unavailable_reason() -> str | None:
    """One line to show a user or a skipped test; None when compiling works."""
    remedy = f"pip install --no-deps jax-cuda13-pjrt=={jax.__version__}"
    try:
        if not any(importlib.util.find_spec(name) for name in _PLUGINS):
            return f"the CUDA compiler plugin is not installed; {remedy}"
    except ModuleNotFoundError:  # no jax_plugins package at all
        return f"the CUDA compiler plugin is not installed; {remedy}"
    try:
        _mesh("h200")
    except Exception as error:  # whatever the plugin raises, the user can go on without it
        first = (str(error) or type(error).__name__).splitlines()[0]
        return f"the CUDA compiler plugin does not load ({first}); {remedy}"
    return None


def target_names() -> list[str]:
    """The devices that are described."""
    return sorted(path.stem for path in TARGETS.glob("*.txt"))


def compile_for(
    function: Callable[..., Any] | Program,
    *args: Any,
    target: str = "h200",
    static_argnames: tuple[str, ...] = (),
    donate_argnames: tuple[str, ...] = (),
    compiler_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> jax.stages.Compiled:
    """The executable of `function(*args, **kwargs)` for `target`; it can be read but not run here.

    Leaves may be arrays or `ShapeDtypeStruct`; only their shapes matter. A `Program` brings its own
    static and donated arguments. `compiler_options=SPILLS_ARE_ERRORS` refuses register spills.

    Example:
      >>> import jax.numpy as jnp
      >>> if available():
      ...     compile_for(jnp.sin, jax.ShapeDtypeStruct((8,), jnp.float32)).as_text()[:9]
      ... else:
      ...     "HloModule"
      'HloModule'
    """
    reason = unavailable_reason()
    if reason:
        raise ValueError(f"cannot compile for {target!r}: {reason}")
    mesh = _mesh(target)
    place = NamedSharding(mesh, PartitionSpec())
    args, kwargs = _abstract(args, place), _abstract(kwargs, place)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = _jitted(function, static_argnames, donate_argnames).trace(*args, **kwargs)
        lowered = traced.lower(lowering_platforms=("cuda",))
        with _not_stored():
            return lowered.compile(compiler_options=compiler_options)


def lower_for_cuda(
    function: Callable[..., Any] | Program,
    *args: Any,
    static_argnames: tuple[str, ...] = (),
    donate_argnames: tuple[str, ...] = (),
    **kwargs: Any,
) -> jax.stages.Lowered:
    """The StableHLO for CUDA; needs no plugin. Pallas kernels appear as Triton custom calls."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = _jitted(function, static_argnames, donate_argnames).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=("cuda",))


@contextlib.contextmanager
def _not_stored() -> Iterator[None]:
    """No persistent compilation cache: what is written without a device cannot be read back."""
    before = getattr(jax.config, _MIN_SECONDS)
    jax.config.update(_MIN_SECONDS, float("inf"))
    try:
        yield
    finally:
        jax.config.update(_MIN_SECONDS, before)


def _jitted(
    function: Callable[..., Any] | Program, static: tuple[str, ...], donate: tuple[str, ...]
) -> Any:
    # Always a new jit: the trace cache does not know that another platform's code is wanted.
    if isinstance(function, Program):
        static = (*function.static_argnames, *static)
        donate = (*function.donate_argnames, *donate)
        function = function.function
    return jax.jit(_fresh(function), static_argnames=static or None, donate_argnames=donate or None)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A new function object with the same signature."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def _abstract(tree: Any, place: NamedSharding) -> Any:
    def describe(leaf: Any) -> Any:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            return leaf
        weak = bool(getattr(leaf, "weak_type", False))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place, weak_type=weak)

    return jax.tree.map(describe, tree)


@functools.lru_cache(maxsize=8)
def _mesh(target: str) -> Mesh:
    """A mesh of the one described device."""
    path = TARGETS / f"{target}.txt"
    if target not in target_names():
        raise ValueError(f"unknown target {target!r}; described are {', '.join(target_names())}")
    from jax.experimental import topologies

    with _registered_plugin():
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target,
            topology="1x1x1",
            target_config=path.read_text(),
        )
    return Mesh(np.array(topology.devices[:1]), ("device",))


@contextlib.contextmanager
def _registered_plugin() -> Iterator[None]:
    """The plugin without its checks for a driver, after JAX has chosen its own backends."""
    with _quiet_discovery():
        jax.local_devices()
        before = os.environ.get(_SKIP_CHECK)
        os.environ[_SKIP_CHECK] = "1"
        try:
            _register_missing_plugin()
            yield
        finally:
            if before is None:
                del os.environ[_SKIP_CHECK]


def _register_missing_plugin() -> None:
    """Registers the plugin again when JAX's own discovery gave up for want of a driver."""
    from jax._src import xla_bridge  # no public way to ask whether a platform is registered

    if "cuda" in getattr(xla_bridge, "_topology_factories", {}):
        return
    for name in _PLUGINS:
        if importlib.util.find_spec(name):
            importlib.import_module(name).initialize()
            return


@contextlib.contextmanager
def _quiet_discovery() -> Iterator[None]:
    """Without the plugin's and JAX's complaints that there is no GPU: we know."""
    loggers = [logging.getLogger(name) for name in ("jax._src.xla_bridge", *_PLUGINS)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
