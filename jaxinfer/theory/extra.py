"""Packages of the extra `theory`, imported when something needs them."""

import importlib
from types import ModuleType


def needed(package: str, purpose: str) -> ModuleType:
    """The package, imported.

    Args:
        package: its name as it is imported.
        purpose: what needs it, the beginning of the message.

    Raises:
        ValueError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{purpose} needs {package}; pip install 'jaxinfer[theory]'") from error
