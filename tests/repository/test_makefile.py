"""`make gpu`, which nobody should have to start twice: every step runs, and the exit status says whether one failed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

STEPS = [
    "-m pip install --quiet --no-deps --no-build-isolation .",
    "-m pytest tests/kernels/gpu/test_cuda.py tests/runtime/test_cuda_graph.py",
    "-m benchmarks.attention",
    "-m benchmarks.decode",
    "-m benchmarks.plots",
    "-m pytest -q tests/kernels",
]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make_gpu(folder: Path, failing: list[str]) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`make gpu` with a Python that only writes down what it is asked for, and the steps that it was."""
    steps, python = folder / "steps", folder / "python"
    cases = "".join(f'"{step}") exit 3 ;;\n' for step in failing)
    python.write_text(f'#!/bin/sh\necho "$PYTHONSAFEPATH:$*" >> {steps}\ncase "$*" in\n{cases}esac\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "gpu", f"GPU_PYTHON={python}"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return made, steps.read_text().splitlines()


@pytest.mark.parametrize("failing", [[], STEPS[:1], STEPS[1:3], STEPS[-1:], STEPS])
def test_every_step_runs_and_the_status_says_whether_one_failed(tmp_path: Path, failing: list[str]) -> None:
    made, steps = make_gpu(tmp_path, failing)
    # The benchmarks are found in the working directory, which is kept off Python's path elsewhere.
    assert steps == [f"{'' if 'benchmarks' in step else '1'}:{step}" for step in STEPS]
    assert (made.returncode != 0) == bool(failing)
    named = made.stdout.partition("failed:\n")[2].splitlines()
    assert [line.partition("python ")[2] for line in named] == failing
