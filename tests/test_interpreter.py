"""The Triton kernels where there is no GPU: in Triton's interpreter, against PyTorch and float64.

Triton is told to interpret before it is imported: so a process of its own runs them, one for all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _version() -> tuple[int, ...]:
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return ()


@pytest.mark.skipif(_version() < (3, 7), reason="needs Triton 3.7, the first whose interpreter takes NumPy 2.4")
def test_the_kernels_do_in_tritons_interpreter_what_the_tests_of_these_files_say():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [str(HERE / name) for name in ("interpreted_product_kernel.py", "test_sweep_kernel.py")]
    plugins = ("-p", "no:cacheprovider", "-p", "tests.quick_interpreter")
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", *plugins]
    ended = subprocess.run(
        command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-3000:]
    assert " passed" in ended.stdout
    assert "skipped" not in ended.stdout
