"""The first use of a GPU: does every kernel compute there what its reference computes?

A kernel that compiles can still be wrong on a device, a driver or a version of JAX that it never
ran on. So each is put to a few random problems (`pallas_kernels.checks`), once for a device,
driver, version of JAX and state of the kernels' sources. The results are kept in the cache folder,
and a kernel that fails is replaced by its reference, with a warning. A CPU runs references and
checks nothing. Several processes may check at once: each writes a whole file.
"""

import functools
import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

import pallas_kernels
from jaxinfer.files import cache_folder, one_line, read_json, write_json
from jaxinfer.progress import Report, bars, silent
from pallas_kernels.checks import Result, check, problems
from pallas_kernels.dispatch import Implementation, replace_by_reference

DRAWS = ((0, True), (1, True), (2, False))
"""The seeds of each operation's problems, and whether their shapes are small."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the results hold for."""

    kind: str
    driver: str  # and runtime, as the client names them
    jax: str
    sources: str  # a hash of the kernels'

    @property
    def file(self) -> Path:
        """Where the results are kept."""
        key = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        return cache_folder() / "kernels" / f"{key}.json"


def device_here() -> Device | None:
    """The CUDA device that JAX uses; None where it uses another."""
    device = jax.devices()[0]
    driver = str(getattr(device.client, "platform_version", ""))
    if device.platform != "gpu" or "cuda" not in driver.lower():
        return None
    return Device(
        kind=device.device_kind, driver=" ".join(driver.split()), jax=jax.__version__,
        sources=_sources(),
    )  # fmt: skip


@functools.cache
def ensure_checked() -> None:
    """Replaces the kernels that fail on this machine's GPU, once per process; on a CPU nothing."""
    device = device_here()
    if device is None:
        return
    results = stored_results(device)
    if results is None:
        with bars() as report:
            results = check_kernels(report=report)
        keep(device, results)
    replace_failed(results, device.file)


def check_kernels(
    implementation: Implementation = "triton",
    *,
    draws: Sequence[tuple[int, bool]] = DRAWS,
    kernels: Sequence[str] | None = None,
    report: Report = silent,
) -> list[Result]:
    """Every kernel, or those named, on its problems; also while JAX traces something else."""
    todo = [
        (kernel, operation, seed, quick)
        for kernel, operation in problems()
        if kernels is None or kernel in kernels
        for seed, quick in draws
    ]
    with ThreadPoolExecutor(1) as thread:  # whose trace is not the one that may surround this call
        waiting = [
            thread.submit(check, kernel, op, seed, implementation=implementation, quick=quick)
            for kernel, op, seed, quick in todo
        ]
        results = []
        for one, (_, operation, *_) in zip(waiting, todo, strict=True):
            report("checking kernels", len(results), len(todo), operation)
            results.append(one.result())
    report("checking kernels", len(todo), len(todo))
    return results


def replace_failed(results: Sequence[Result], file: Path) -> None:
    """The reference in the place of every kernel that failed, each with one warning."""
    for kernel in dict.fromkeys(result.kernel for result in results if not result.passed):
        replace_by_reference(kernel)
        worst = next(r for r in results if r.kernel == kernel and not r.passed)
        why = one_line(worst.message, 200) or f"error {worst.error:.3g} over {worst.tolerance:.3g}"
        warnings.warn(
            f"the kernel {kernel} fails on this device ({worst.problem}: {why}); its slower "
            f"reference is used instead. `jaxinfer env --check` tries again; results: {file}",
            stacklevel=4,
        )


def keep(device: Device, results: Sequence[Result]) -> None:
    """Writes the results, where the cache folder can be written: else the next process checks."""
    try:
        device.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(device.file, {"device": asdict(device), "results": [*map(as_json, results)]})
    except OSError as error:
        warnings.warn(f"the kernels' check is not kept: {one_line(error)}", stacklevel=2)


def stored_results(device: Device) -> list[Result] | None:
    """What was kept for the device; None if there is nothing, or nothing whole."""
    try:
        data = read_json(device.file)
        if data["device"] != asdict(device):
            return None
        found = [_result(item) for item in data["results"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    asked = {(kernel, f"{op} {seed}") for kernel, op in problems() for seed, _ in DRAWS}
    return found if {(r.kernel, r.problem) for r in found} == asked else None


def as_json(result: Result) -> dict[str, Any]:
    """A result as JSON has it: an error that is no number is text."""
    return asdict(result) | {"error": repr(result.error), "passed": result.passed}


def _result(item: dict[str, Any]) -> Result:
    texts = {name: item[name] for name in ("kernel", "problem", "message")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("a result's names must be texts")
    return Result(error=float(item["error"]), tolerance=float(item["tolerance"]), **texts)


@functools.cache
def _sources() -> str:
    """A hash of the kernels' sources and tilings."""
    folder = Path(pallas_kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
