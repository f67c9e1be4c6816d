"""An HTTP server with the OpenAI API around a batcher (`jaxinfer serve`).

app = create_app(lm.batcher(slots=8), ServeConfig(name="smollm2"))

The app is a Starlette application, to be run by uvicorn or mounted in another one. Everything below
needs the packages of the extra `serve`, which are imported when an app is made.
"""

import importlib
from typing import TYPE_CHECKING

from jaxinfer.serve.config import ServeConfig as ServeConfig

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from jaxinfer.decode.batcher import Batcher

PACKAGES = ("llguidance", "prometheus_client", "pydantic", "sse_starlette", "starlette", "uvicorn")
"""What the extra `serve` brings."""

__all__ = ["ServeConfig", "create_app"]


def create_app(batcher: "Batcher", config: ServeConfig | None = None) -> "Starlette":
    """An ASGI application that answers the OpenAI API from a batcher.

    The batcher stays the caller's: to be closed when the app does not run any more.

    Args:
      batcher: what generates; its model must have a tokenizer.
      config: names, keys and limits; None takes the defaults of `ServeConfig`.

    Raises:
      ValueError: a package of the extra is missing, or the model has no tokenizer of its own.

    Example:
      >>> import jaxinfer as ji
      >>> from jaxinfer.serve import ServeConfig, create_app
      >>> with ji.load("tiny-llama").batcher(slots=1, context=64) as batcher:
      ...     app = create_app(batcher, ServeConfig(warmup=False))
      >>> sorted(route.path for route in app.routes)[:3]
      ['/detokenize', '/health', '/metrics']
    """
    check_packages()
    from jaxinfer.serve.app import make

    return make(batcher, ServeConfig() if config is None else config)


def check_packages() -> None:
    """Refuses to go on where a package of the extra is missing."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"the server needs {package}; pip install 'jaxinfer[serve]'"
            ) from error
