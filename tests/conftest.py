"""What all tests share: run-time shape checks, the CPU, a compilation cache, a tiny model.

Shapes and dtypes of annotated functions are checked by beartype in every test: the import hook must
come before the first import of jaxinfer, so it stands here.
"""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault(
    # Kept between runs: most of the time of a fresh run is compilation.
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"jaxinfer-tests-{os.getuid()}" / "programs"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
from jaxtyping import install_import_hook

from tests import checking  # noqa: F401 (the hook looks it up by name)

install_import_hook(["jaxinfer", "pallas_kernels"], "tests.checking.checked")

collect_ignore_glob = ["*/conftest.py"]  # nothing to doctest, and their module names collide

MAPPINGS = Path("/proc/self/maps")
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9  # GB
# Linux allows a process 65,530; XLA dies of a segmentation fault there. 45,000 take 7 GB.
MOST_MAPPINGS = min(45_000, int(2_000 * MEMORY))

# These compile as users do (one asks for equal bits of two programs), and so does all that is slow.
AS_USERS_DO = (
    "tests/inspection",
    "tests/runtime",
    "tests/test_smollm2.py",
    "tests/cache/test_less_preset.py",
)


def pytest_runtest_setup(item):
    """Lets most tests' engines compile quickly."""
    from jaxinfer.runtime.program import Program
    from jaxinfer.testing.quick import QUICK

    path = item.path.relative_to(item.config.rootpath).as_posix()
    full = path.startswith(AS_USERS_DO) or item.get_closest_marker("slow") is not None
    Program.compiler_options = {} if full else QUICK


def pytest_runtest_teardown(item, nextitem):
    """Forgets compiled programs when there are many: each takes several memory mappings. Not
    before, as most are needed again."""
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
