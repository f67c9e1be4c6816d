"""What all tests share: run-time shape checks, the CPU, quick compilation and its cache.

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

from tests import checking, compilation  # noqa: F401 (the hook looks the former up by name)

install_import_hook(["jaxinfer", "pallas_kernels"], "tests.checking.checked")
# XLA reads this when it makes its first client, which no import of jax does.
os.environ.setdefault("XLA_FLAGS", compilation.FLAGS)
compilation.quickly(True)
# Walks through all traced programs took a tenth of the time; large garbage is seen to below.
gc.set_threshold(50_000, 20, 20)

collect_ignore_glob = ["*/conftest.py"]  # nothing to doctest, and their module names collide

PROCESS = Path("/proc/self")
PAGE = os.sysconf("SC_PAGE_SIZE") / 1e9  # GB
MEMORY = PAGE * os.sysconf("SC_PHYS_PAGES")
# Linux allows a process 65,530; XLA dies of a segmentation fault there. 36,000 take 7 GB.
MOST_MAPPINGS = min(36_000, int(1_500 * MEMORY))

# These compile as users do (two ask for equal bits of two programs), and so does all that is slow
# or compiles for a GPU.
AS_USERS_DO = (
    "tests/inspection",
    "tests/runtime/test_compilation_cache.py",
    "tests/runtime/test_layout.py",
    "tests/runtime/test_memory.py",
    "tests/runtime/test_program.py",
    "tests/test_smollm2.py",
    "tests/train/test_loop.py",
    "tests/cache/test_less_preset.py",
)

programs = 0  # compiled since the mappings were counted
collected = 0.0  # GB of the process when garbage was last collected


def count_program(event, *_, **__):
    global programs
    programs += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(count_program)


def pytest_runtest_setup(item):
    """Lets most tests compile quickly."""
    path = item.path.relative_to(item.config.rootpath).as_posix()
    marked = any(item.get_closest_marker(name) for name in ("slow", "gpu_compile"))
    compilation.quickly(not (marked or path.startswith(AS_USERS_DO)))


def pytest_runtest_teardown(item, nextitem):
    """Collects garbage when memory has grown, and forgets compiled programs when there are many:
    each takes several memory mappings. Not before, as most are needed again."""
    global programs, collected
    if not PROCESS.exists():
        return
    if memory() > collected + 0.5:
        gc.collect()
        collected = memory()
    if programs < 100:  # counting the mappings takes 30 ms
        return
    programs = 0
    if (PROCESS / "maps").read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def memory() -> float:
    """GB that this process holds."""
    return PAGE * int((PROCESS / "statm").read_text().split()[1])
