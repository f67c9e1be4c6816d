"""`Program`: a jitted function whose compilations are explicit, counted and timed.

`jax.jit` hides when it compiles; a serving loop wants to know, to warm up, and to read the
compiled code. A `Program` keeps one ahead-of-time executable per signature: the values of the
static arguments and the tree, shapes, dtypes and weak types of the others (`jax.ShapeDtypeStruct`
leaves count as the arrays that they describe, so `prepare` can run before any array exists).

The key costs about 90 us for 300 leaves (measured, 2-core Xeon); the executable's own call takes
twice that. A Program is called from the host: inside a traced function use `.function`.
"""

import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

_MODES = ("jax_enable_x64", "jax_default_matmul_precision")  # settings that change what is traced


@dataclass(frozen=True)
class Compiled:
    """An executable and the seconds it took: tracing with lowering, and XLA."""

    executable: jax.stages.Compiled
    trace_s: float
    compile_s: float

    @property
    def total_s(self) -> float:
        return self.trace_s + self.compile_s


class Program:
    """`jax.jit` compiled ahead of time, one executable per signature.

    Args:
      function: a pure function of pytrees.
      static_argnames: arguments that are hashable constants of the compilation.
      donate_argnames: arguments whose buffers the outputs may reuse; the caller must drop them.
      name: shown in errors; the function's name when empty.

    Example:
      >>> import jax.numpy as jnp
      >>> double = Program(lambda x, times: x * times, static_argnames=("times",))
      >>> double(jnp.ones(3), 2).tolist(), double(jnp.zeros(3), times=2).tolist(), double.traces
      ([2.0, 2.0, 2.0], [0.0, 0.0, 0.0], 1)
    """

    # XLA options of every compilation; the test suite, which has quick compilation as its default,
    # takes those of users back where they matter.
    compiler_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        static_argnames: tuple[str, ...] = (),
        donate_argnames: tuple[str, ...] = (),
        name: str = "",
    ):
        self.function = function
        self.name = name or getattr(function, "__name__", "program")
        self.static_argnames = tuple(static_argnames)
        self.donate_argnames = tuple(donate_argnames)
        self.traces = 0
        self.compile_s = 0.0
        self.last_compile_s = 0.0
        self._compiled: dict[Any, Compiled] = {}
        self._lock = threading.RLock()
        parameters = inspect.signature(function).parameters
        unknown = set(self.static_argnames + self.donate_argnames) - set(parameters)
        if unknown:
            raise ValueError(
                f"{self.name}: {sorted(unknown)} are not arguments; it takes {list(parameters)}"
            )
        self._static = frozenset(self.static_argnames)
        self._positions = tuple(
            (i, name) for i, name in enumerate(parameters) if name in self._static
        )
        self._defaults = {
            name: parameters[name].default
            for name in self.static_argnames
            if parameters[name].default is not inspect.Parameter.empty
        }
        self.jitted: Any = jax.jit(
            self._counted(function),
            static_argnames=self.static_argnames,
            donate_argnames=self.donate_argnames,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, compiling first when the signature is new."""
        key, args, kwargs, static = self._signature(args, kwargs)
        found = self._compiled.get(key)
        if found is None:
            found = self._compile(key, args, kwargs, static)
        else:
            self.last_compile_s = 0.0
        return found.executable(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Compiled:
        """The compiled form for this signature, without running it; leaves may be abstract."""
        key, args, kwargs, static = self._signature(args, kwargs)
        found = self._compiled.get(key)
        if found is None:
            return self._compile(key, args, kwargs, static)
        self.last_compile_s = 0.0
        return found

    def __len__(self) -> int:
        """Number of executables held."""
        return len(self._compiled)

    def __bool__(self) -> bool:
        return True

    def clear(self) -> None:
        """Forgets every executable (and jit's own trace cache of this function)."""
        self._compiled.clear()
        self.jitted.clear_cache()

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args, **kwargs):
            self.traces += 1
            return function(*args, **kwargs)

        # jit resolves argument names through the signature and names the module after the function.
        counted.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        counted.__name__ = counted.__qualname__ = self.name
        return counted

    def _signature(self, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict, dict[str, Any]]:
        """The key, the arguments without the static ones, and the static ones by name."""
        static: dict[str, Any] = {}
        if self._static:
            static.update(self._defaults)
            taken = [(i, name) for i, name in self._positions if i < len(args)]
            for i, name in taken:
                static[name] = args[i]
            if taken:
                skip = {i for i, _ in taken}
                args = tuple(value for i, value in enumerate(args) if i not in skip)
            for name in self._static.intersection(kwargs):
                static[name] = kwargs[name]
            kwargs = {name: value for name, value in kwargs.items() if name not in self._static}
        leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
        try:  # every jax.Array carries an interned abstract value: shape, dtype, weak type
            avals = tuple([leaf.aval for leaf in leaves])
        except AttributeError:
            avals = tuple([jax.typeof(leaf) for leaf in leaves])
        constants = tuple([static.get(name, _ABSENT) for name in self.static_argnames])
        places = _placements(leaves) if jax.device_count() > 1 else None
        mode = tuple([getattr(jax.config, name) for name in _MODES])
        key = (constants, tree, avals, places, mode)
        try:
            hash(key)
        except TypeError as error:
            raise ValueError(
                f"{self.name}: static arguments {list(self.static_argnames)} must be hashable: "
                f"{error}"
            ) from error
        return key, args, kwargs, static

    def _compile(self, key: Any, args: tuple, kwargs: dict, static: dict[str, Any]) -> Compiled:
        with self._lock:
            if key in self._compiled:
                return self._compiled[key]
            positional, named = self._with_static(args, kwargs, static)
            start = time.perf_counter()
            lowered = self.jitted.trace(*positional, **named).lower()
            middle = time.perf_counter()
            executable = lowered.compile(compiler_options=self.compiler_options or None)
            end = time.perf_counter()
            made = Compiled(executable, middle - start, end - middle)
            self._compiled[key] = made
            self.last_compile_s = made.total_s
            self.compile_s += made.total_s
            return made

    def _with_static(self, args: tuple, kwargs: dict, static: dict) -> tuple[tuple, dict]:
        """The full call again: positional arguments, with static ones back at their places."""
        static = dict(static)
        positional: list[Any] = []
        remaining = list(args)
        static_at = dict(self._positions)
        while remaining:
            name = static_at.get(len(positional))
            if name is None:
                positional.append(remaining.pop(0))
            else:
                positional.append(static.pop(name))
        return tuple(positional), {**kwargs, **static}


class _Absent:
    def __repr__(self) -> str:
        return "<absent>"


_ABSENT = _Absent()


def _placements(leaves: list[Any]) -> tuple:
    """Where committed (or abstract but placed) leaves live; None for those that just follow."""
    return tuple(
        [
            leaf.sharding if getattr(leaf, "committed", hasattr(leaf, "sharding")) else None
            for leaf in leaves
        ]
    )
