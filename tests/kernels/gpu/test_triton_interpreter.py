"""Without a GPU the Triton kernels are tested in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from packaging.version import Version

triton = pytest.importorskip("triton")


# Triton 3.6's interpreter turns one-element arrays into loop bounds in a way NumPy 2.4 no longer has.
BROKEN = Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4")
OPERATIONS = ("append", "attend")

pytestmark = [
    pytest.mark.skipif(BROKEN, reason="this Triton's interpreter cannot run loops with this NumPy"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' own tests run on the GPU here"),
]


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The tests of each operation that have a mark, or have none, in a process of their own, all at once: the
    interpreter uses one core.
    """
    # Triton decides as it is imported, once for a process.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    processes = {}
    for operation in OPERATIONS:
        tests = Path(__file__).with_name(f"test_triton_{operation}.py")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", request.param, str(tests)]
        processes[operation] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("started", ["not choices", pytest.param("choices", marks=pytest.mark.choices)], indirect=True)
def test_in_the_interpreter(operation: str, started: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = started[operation].communicate()
    assert started[operation].returncode == 0, output[-5000:]
    assert "passed" in output
