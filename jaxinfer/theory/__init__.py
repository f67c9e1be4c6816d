"""Theory of training and of compression, as code that checks it (`ji.theory`).

`joma` is the joint dynamics of MLP and attention (arXiv 2310.00535); `r_rho` a relaxation of
optimal transport (arXiv 2307.10042), and `transport` what belongs to it; `diagnose` chooses a cache
policy for every layer by what each does there. A name is imported when it is first used, and what
needs a package of the extra `theory` says so.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfer.theory import diagnose as diagnose
    from jaxinfer.theory import joma as joma
    from jaxinfer.theory import transport as transport
    from jaxinfer.theory.transport import r_rho as r_rho

# name: (module, attribute), where None stands for the module itself
_PLACES: dict[str, tuple[str, str | None]] = {
    "diagnose": ("jaxinfer.theory.diagnose", None),
    "joma": ("jaxinfer.theory.joma", None),
    "r_rho": ("jaxinfer.theory.transport", "r_rho"),
    "transport": ("jaxinfer.theory.transport", None),
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
