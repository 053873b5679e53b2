"""Starting two processes that work together."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers.repository import ROOT

# In seconds: several times what the longest script takes on two slow cores.
TIME_OUT = 600


def seen_by_ranks(script: str, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes saw that torchrun starts with a script of this room; they leave it in the folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*torchrun, Path(__file__).with_name(script), folder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIME_OUT,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
