"""cpu.cpp as a loaded library: compiled on this machine at first use, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvmix_compile.kernels.cache_folder import cache_folder
from kvmix_compile.kernels.cpu.interface import Attention, BlockFormat, Shape, Side, Threads, check

SOURCE = Path(__file__).with_name("cpu.cpp")
SWITCH = "KVMIX_CPU_KERNELS"
COMPILERS = ("c++", "g++", "clang++")

# Denormal and infinite numbers mean what they mean elsewhere; errno and traps are not looked at.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wno-psabi")
# The first that the compiler takes.
MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",), ())

# Compiling takes a few seconds; much longer, and something is wrong with the compiler.
COMPILE_SECONDS = 300


@dataclass(frozen=True)
class Library:
    """The functions of cpu.cpp; of pages, they say whether all that is read is in one, and otherwise do nothing.

    parallel: the address of GOMP_parallel in the OpenMP runtime that PyTorch runs on, so that no second set of threads
        competes with PyTorch's; 0 where that runtime has no such function, and one thread must do.
    """

    attend: Callable[[Shape, Side, Side, BlockFormat, BlockFormat, Attention, Threads], bool]
    append: Callable[[Shape, Side, Side, BlockFormat, BlockFormat, Threads], bool]
    parallel: int


class CompilerError(Exception):
    """Why there is no library; the message is part of a warning."""


@lru_cache
def library() -> Library | None:
    """Loads cpu.cpp, compiled before that if need be. None where it is switched off (KVMIX_CPU_KERNELS=0), and, with a
    warning that says what to do, where it cannot be compiled.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return load(compiled(cache_folder()))
    except (CompilerError, OSError) as error:
        warnings.warn(
            f"attention over a compressed cache runs slowly on this CPU, in plain PyTorch: {error}. Install a C++ "
            f"compiler (g++ or clang++, or name one in $CXX); {SWITCH}=0 chooses plain PyTorch, without this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def load(file: Path) -> Library:
    """Raises OSError where the file is none that this machine can run, and InterfaceError where it takes other
    structures than those of interface.py.
    """
    loaded = ctypes.CDLL(str(file))
    check(loaded)
    return Library(
        attend=_taking(loaded.kvmix_attend, Shape, Side, Side, BlockFormat, BlockFormat, Attention, Threads),
        append=_taking(loaded.kvmix_append, Shape, Side, Side, BlockFormat, BlockFormat, Threads),
        parallel=_parallel_address(),
    )


def _taking(function: Any, *structures: type[ctypes.Structure]) -> Any:
    """The function, which takes such structures by address, and none in the place of another."""
    function.argtypes, function.restype = [ctypes.POINTER(structure) for structure in structures], ctypes.c_bool
    return function


def compiled(folder: Path) -> Path:
    """The library's file in this folder, compiled unless it is there.

    Raises CompilerError, or OSError where the compiler or the folder cannot be used.
    """
    compiler = _compiler()
    target = folder / f"cpu-{_fingerprint(compiler)}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Other processes may compile at the same time: each makes a file of its own, which appears complete or not at all.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "cpu.so"
        _compile(compiler, made)
        made.replace(target)
    return target


def _compiler() -> str:
    candidates = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        raise CompilerError(f"none of {', '.join(candidates)} is installed")
    return found


def _fingerprint(compiler: str) -> str:
    """Of all that the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS, check=False).stdout
    sources = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    parts = (
        *(source.read_bytes() for source in sources),
        repr((FLAGS, MACHINE_FLAGS)).encode(),
        compiler.encode(),
        version,
        _processor(),
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:20]


def _processor() -> bytes:
    """What native code may use: a cache can be shared by different machines."""
    names = {"model name", "flags", "Features", "CPU implementer", "CPU part"}
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}".encode()
    lines = [line for line in first.splitlines() if line.split(":")[0].strip() in names]
    return "\n".join([platform.machine(), *lines]).encode()


def _compile(compiler: str, target: Path) -> None:
    for machine_flags in MACHINE_FLAGS:
        command = [compiler, *FLAGS, *machine_flags, str(SOURCE), "-o", str(target)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise CompilerError(f"{compiler} did not come to an end") from None
        if result.returncode == 0:
            return
    complaint = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
    raise CompilerError(f"{compiler} failed: {complaint}")


def _parallel_address() -> int:
    """GOMP_parallel: GCC's OpenMP runtime has it, LLVM's and Intel's have it too."""
    folder = Path(torch.__file__).with_name("lib")
    bundled = [file for name in ("libgomp*", "libomp*", "libiomp*") for file in folder.glob(name)]
    for name in (*map(str, bundled), None):
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
