"""Which combinations of parameters the default suite runs."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def diagonal(*axes: Iterable[Any]) -> list:
    """The parameters of all combinations of the axes, slow but for a diagonal, on which every
    value of every axis occurs.

    Args:
        axes: values, or `pytest.param`s of one or several; those that are slow stay so.
    """
    params = [[x if hasattr(x, "marks") else pytest.param(x) for x in axis] for axis in axes]
    fast = [[x for x in axis if not x.marks] for axis in params]
    longest = max(map(len, fast))
    chosen = [tuple(axis[i % len(axis)] for axis in fast) for i in range(longest)]
    return [
        pytest.param(
            *(value for one in combination for value in one.values),
            id="-".join(map(_name, combination)),
            marks=() if combination in chosen else pytest.mark.slow,
        )
        for combination in itertools.product(*params)
    ]


def _name(param) -> str:
    value = param.values[0]
    return param.id or getattr(value, "__name__", str(value))
