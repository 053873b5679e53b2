"""What a stored result needs besides its numbers: on what, with what and how they were made."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def circumstances() -> dict[str, Any]:
    """Device, versions and command of this run."""
    packages = ("kvmix-compile", "torch", "transformers")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "command": [Path(sys.argv[0]).stem, *sys.argv[1:]],
    }
