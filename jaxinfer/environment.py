"""What a record says about the machine: versions, CPU, cores and the commit; no names, no paths."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers")
ROOT = Path(__file__).parents[1]
WATCHED = ("jaxinfer", "pallas_kernels", "bench", "tools", "checkpoints", "pyproject.toml")


def environment() -> dict[str, Any]:
    """The JSON-ready description that goes into a record."""
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": cores(),
        "commit": commit(),
    }


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def commit() -> str | None:
    """The checkout's commit, with "+" when anything that a figure rests on differs from it.

    None outside a checkout.
    """
    if not (ROOT / ".git").exists():  # an environment may lie inside the checkout of something else
        return None
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *WATCHED, ":!bench/results")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def package_version(package: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
