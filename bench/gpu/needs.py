"""What the suite can do without on a bare machine.

The library annotates shapes with jaxtyping, which does nothing outside of the tests; a machine that
has jax alone gets names that accept any subscript instead.
"""

import importlib.util
import sys
import types
from typing import Any


class _Anything:
    def __class_getitem__(cls, _: Any) -> Any:
        return Any


def stand_in_for_jaxtyping() -> None:
    """Puts a module of that name in place unless there is one."""
    if "jaxtyping" in sys.modules or importlib.util.find_spec("jaxtyping"):
        return
    import jax

    module = types.ModuleType("jaxtyping")
    module.__getattr__ = lambda name: jax.Array if name == "Array" else _Anything
    sys.modules["jaxtyping"] = module
