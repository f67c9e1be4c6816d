"""The problems of the other files with a library that stops at wrong reads and writes, at undefined
behaviour, and with more threads than this machine has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.cpu_kernels import loading
from tests.cpu_kernels.using import needs_kernels

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, needs_kernels]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The folder of such a library."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("there is no cmake or g++ here")
    folder = tmp_path_factory.mktemp("sanitized")
    options = ["-DSANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(["cmake", "-S", loading.FOLDER, "-B", folder, *options], check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    return folder


def runtime(name: str) -> str:
    """The path of a library that has to be there before Python starts."""
    asked = ["g++", f"-print-file-name={name}"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def test_nothing_is_read_or_written_out_of_bounds(library):
    variables = {
        loading.PLACE: str(library), "NPROC": "5",
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    files = sorted(HERE.glob("test_*product.py")) + sorted(HERE.glob("test_*mlp.py"))
    command = [sys.executable, "-m", "pytest", "-n0", "-s", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=1800
    )
    told = done.stdout[-5000:] + done.stderr[-5000:]
    assert done.returncode == 0 and " passed" in done.stdout, told
