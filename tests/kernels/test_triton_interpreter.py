"""Without a GPU the Triton kernels are tested in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from packaging.version import Version

triton = pytest.importorskip("triton")


# Triton 3.6's interpreter turns one-element arrays into loop bounds in a way NumPy 2.4 no longer has.
BROKEN = Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4")


@pytest.mark.skipif(BROKEN, reason="this Triton's interpreter cannot run loops with this NumPy")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' own tests run on the GPU here")
@pytest.mark.parametrize("operation", ["append", "attend"])
def test_in_the_interpreter(operation: str) -> None:
    # Triton decides as it is imported, once for a process.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    tests = Path(__file__).with_name(f"test_triton_{operation}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
