"""`jaxinfer env`: what a report of a problem should contain."""

import os
import platform
import sys
from importlib import util
from typing import Annotated

import typer

from jaxinfer.cli import options as o
from jaxinfer.environment import cores, package_version
from jaxinfer.files import one_line
from jaxinfer.typing import Json

PACKAGES = (
    *("jaxinfer", "jax", "jaxlib", "jax-cuda13-pjrt", "jax-cuda13-plugin", "flax", "optax"),
    *("orbax-checkpoint", "numpy", "safetensors", "tokenizers", "transformers", "gguf", "torch"),
)
EXTRAS = {
    "test": ("pytest", "hypothesis", "beartype"),
    "bench": ("torch", "psutil"),
    "plot": ("matplotlib",),
    "theory": ("diffrax", "scipy"),
    "serve": ("starlette", "uvicorn", "sse_starlette", "pydantic", "llguidance"),
    "hexgen": ("ray", "scipy", "networkx"),
    "cuda": ("jax_cuda13_plugin",),
}
VARIABLES = (
    *("JAX_PLATFORMS", "XLA_FLAGS", "OMP_NUM_THREADS", "JAXINFER_CACHE", "XDG_CACHE_HOME"),
    *("JAXINFER_CPU_KERNELS", "JAXINFER_CPU_LIBRARY"),
)


CheckOption = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Compare every kernel with its reference and keep the results; without a GPU the "
        "kernels are interpreted, on small problems. The exit status is 1 if one fails.",
    ),
]


def env(check: CheckOption = False, as_json: o.JsonOption = False) -> None:
    """Print versions, devices, cache folders and installed extras."""
    if check:
        if not check_kernels(as_json):
            raise typer.Exit(1)
        return
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


def check_kernels(as_json: bool) -> bool:
    """Checks all kernels anew and prints the results; whether all passed."""
    from jaxinfer.runtime import kernel_check
    from pallas_kernels.checks import problems

    device, results = kernel_check.device_here(), []
    if not as_json:
        where = device.kind if device else "interpreted, no CUDA device: references compute here"
        print(f"kernels: {where}")
    for kernel in dict.fromkeys(kernel for kernel, _ in problems()):
        found = (
            kernel_check.check_kernels("interpret", draws=((0, True),), kernels=[kernel])
            if device is None
            else kernel_check.check_kernels(kernels=[kernel])
        )
        results += found
        for result in [] if as_json else found:
            verdict = "ok" if result.passed else "FAILED"
            error = one_line(result.message, 100) or f"{result.error:.2g} of {result.tolerance:.2g}"
            print(f"  {kernel:18} {result.problem:22} {verdict:7} {error}", flush=True)
    if device is not None:
        kernel_check.keep(device, results)
    passed = all(result.passed for result in results)
    if as_json:
        o.print_json({
            "device": device and device.kind, "file": device and str(device.file),
            "implementation": "interpret" if device is None else "triton", "passed": passed,
            "results": [*map(kernel_check.as_json, results)],
        })  # fmt: skip
    return passed


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
        "kernels": _kernels(),
        "cpu_kernels": _cpu_kernels(),
        "gpu_compiler": gpu_target.unavailable_reason() or "available",
        "model_cache": str(models),
        "program_cache": None if programs is None else str(programs),
        "models": {name: _is_here(name) for name in MODELS},
        "extras": {name: all(map(_installed, needs)) for name, needs in EXTRAS.items()},
        "versions": {name: package_version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _kernels() -> str:
    """What is known of the kernels on this device."""
    from jaxinfer.runtime import kernel_check

    device = kernel_check.device_here()
    if device is None:
        return "references, no CUDA device"
    results = kernel_check.stored_results(device)
    if results is None:
        return "not checked yet; the first use does, or `jaxinfer env --check`"
    failed = sorted({result.kernel for result in results if not result.passed})
    return f"replaced by references: {', '.join(failed)}" if failed else "all checked"


def _cpu_kernels() -> str:
    """Which CPU kernels are in use, or why none is."""
    from jaxinfer.cpu_kernels import loading

    found = loading.state()
    if found.library is None:
        return f"off, XLA computes: {found.reason}"
    names = ", ".join(name.removeprefix("jaxinfer_") for name in loading.HANDLERS)
    return f"{names}, with {found.reason} of {', '.join(loading.instruction_sets())}"


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
