"""The choice between a kernel and its reference; imports no kernel language."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax

Implementation = Literal["reference", "triton", "interpret"]
KeyLayout = Literal["BKHS", "BKSH"]  # of stored keys; kernels read the second


def dispatch(
    implementation: Implementation | None,
    reference: Callable[..., Any],
    triton: Callable[..., Any],
    *args: Any,
) -> Any:
    """`reference(*args)`, or `triton(*args, interpret=...)`.

    None takes the kernel on a CUDA device and the reference anywhere else, decided when the
    program is lowered; for a kernel of `replace_by_reference` the reference everywhere. A named
    implementation never falls back to another: "triton" on a CPU is an error of the compiler.
    "interpret" runs the kernel's body on any device, for tests.
    """
    check_implementation(implementation)
    if implementation is None:
        if kernel_name(triton) in _REPLACED:
            return reference(*args)
        kernel = _once(triton, interpret=False)
        return jax.lax.platform_dependent(*args, cuda=kernel, default=reference)
    if implementation == "reference":
        return reference(*args)
    return _once(triton, interpret=implementation == "interpret")(*args)


_REPLACED: set[str] = set()


def replace_by_reference(kernel: str) -> None:
    """From now on the reference of `kernel` (the name of its folder) computes where no
    implementation is named. Programs that were traced before stay as they are."""
    _REPLACED.add(kernel)


def replaced_kernels() -> frozenset[str]:
    """The kernels whose references compute."""
    return frozenset(_REPLACED)


def kernel_name(triton: Callable[..., Any]) -> str:
    """The name of the folder whose `api.py` has this function."""
    while isinstance(triton, functools.partial):
        triton = triton.func
    return triton.__module__.split(".")[-2] if "." in triton.__module__ else triton.__module__


def check_implementation(name: str | None, known: Sequence[str] = get_args(Implementation)) -> None:
    """Raises unless `name` is None or `known`."""
    if name is not None and (not isinstance(name, str) or name not in known):
        names = ", ".join(map(repr, known))
        given = ascii(name)[:60] if isinstance(name, str) else f"a {type(name).__name__}"
        raise ValueError(f"implementation must be None, {names}, got {given}")


def check_layout(layout: KeyLayout, implementation: Implementation | None) -> None:
    """Raises if a kernel is asked for keys in a layout that only references read."""
    if layout == "BKHS" and implementation != "reference":
        raise ValueError(
            'kernels read keys in the layout "BKSH", got "BKHS" with implementation '
            f"{implementation!r}"
        )


def _once(triton: Callable[..., Any], interpret: bool) -> Callable[..., Any]:
    """`triton` as a function that is traced and lowered once, not once for every layer of a model:
    its keywords are static. A closure, which is new every time, is left as it is."""
    if not isinstance(triton, functools.partial):
        return functools.partial(triton, interpret=interpret)
    options = triton.keywords | {"interpret": interpret}
    return functools.partial(_jitted(triton.func, tuple(sorted(options))), *triton.args, **options)


@functools.cache
def _jitted(function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=static)
