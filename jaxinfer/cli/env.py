"""`jaxinfer env`: what a report of a problem should contain."""

import os
import platform
import sys
from importlib import util

from jaxinfer.cli import options as o
from jaxinfer.environment import cores, package_version
from jaxinfer.typing import Json

PACKAGES = (
    *("jaxinfer", "jax", "jaxlib", "jax-cuda13-pjrt", "jax-cuda13-plugin", "flax", "optax"),
    *("orbax-checkpoint", "numpy", "safetensors", "tokenizers", "transformers", "gguf", "torch"),
)
EXTRAS = {
    "test": ("pytest", "hypothesis", "beartype"),
    "bench": ("torch", "psutil"),
    "plot": ("matplotlib",),
    "serve": ("starlette", "uvicorn"),
    "hexgen": ("ray", "scipy"),
    "cuda": ("jax_cuda13_plugin",),
}
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "OMP_NUM_THREADS", "JAXINFER_CACHE", "XDG_CACHE_HOME")


def env(as_json: o.JsonOption = False) -> None:
    """Print versions, devices, threads, cache folders and installed extras."""
    record = environment()
    if as_json:
        o.print_json(record)
        return
    for name, value in record.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key:20} {'-' if item is None else item}")
        else:
            print(f"{name:22} {value}")


def environment() -> Json:
    """The record that `jaxinfer env --json` prints."""
    import jax

    import jaxinfer
    from jaxinfer.files import cache_folder
    from jaxinfer.inspection import gpu_target
    from jaxinfer.io.model_index import MODELS
    from jaxinfer.runtime.compilation_cache import enable_persistent_cache
    from jaxinfer.runtime.memory import host_available_bytes

    programs = enable_persistent_cache()
    models = cache_folder() / "models"
    return {
        "jaxinfer": jaxinfer.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "backend": jax.default_backend(),
        "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        "threads": cores(),
        "memory_available_bytes": host_available_bytes(),
        "gpu_compiler": gpu_target.unavailable_reason() or "available",
        "model_cache": str(models),
        "program_cache": None if programs is None else str(programs),
        "models": {name: _is_here(name) for name in MODELS},
        "extras": {name: all(map(_installed, needs)) for name, needs in EXTRAS.items()},
        "versions": {name: package_version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _is_here(name: str) -> bool:
    """Whether a named model can be loaded without fetching it."""
    from jaxinfer.files import cache_folder
    from jaxinfer.io.model_index import MODELS, FolderModel, ModelUnavailable, committed_folder

    model = MODELS[name]
    if not isinstance(model, FolderModel):
        return (cache_folder() / "models" / name).is_dir()
    try:
        return committed_folder(model).is_dir()
    except ModelUnavailable:
        return False


def _installed(module: str) -> bool:
    return util.find_spec(module) is not None
