"""Two devices that are not the CPU, toy:0 and toy:1: what mixes their tensors raises, as on two GPUs.

PyTorch has a backend for the rest of a process, and autograd counts devices once: this is for processes of their own.
"""

import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from kvmix_compile.kernels.cpu.library import COMPILERS

SOURCE = Path(__file__).with_suffix(".cpp")
NAME, DEVICES = "toy", ("toy:0", "toy:1")
FLAGS = ("-O0", "-std=c++20", "-shared", "-fPIC")
# In seconds: ten times what it takes on two slow cores.
COMPILE_SECONDS = 300


def compile_toy_device(folder: Path) -> Path:
    """The devices as a library in this folder."""
    target = folder / "toy_device.so"
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()]
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    command = [compiler, *FLAGS, *includes, str(SOURCE), *libraries, "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(target)], check=True, timeout=COMPILE_SECONDS, env=os.environ | {"LC_ALL": "C"})
    return target


def load_toy_device(library: Path) -> None:
    """Make the devices known to PyTorch."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend()


def _device_module() -> ModuleType:
    """What PyTorch asks of torch.toy."""
    module = ModuleType(f"torch.{NAME}")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: len(DEVICES),
        current_device=lambda: 0,
        device=nullcontext,
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
    )
    return module
