"""Sizes and shapes, on the host; imports no kernel language."""

from collections.abc import Sequence

import jax


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return 1 << (max(n, least) - 1).bit_length()


def dividing_power(n: int, most: int) -> int:
    """The largest power of two that divides `n`, at most `most`."""
    return min(n & -n, most)


def blocks_of(n: int, size: int) -> int:
    """How many blocks of `size` cover `n`."""
    return -(-n // size)


def expect(name: str, x: jax.Array, shape: Sequence[int | None]) -> None:
    """Raises unless `x` has `shape`; None stands for any size."""
    fits = x.ndim == len(shape) and all(
        wanted is None or given == wanted for given, wanted in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("_" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(x.shape)}")
