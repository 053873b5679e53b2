"""A driver for Triton without a GPU: kernels that are launched on CPU tensors are compiled for a chip, as they would be
for the GPU, and their PTX is carried out.

    with chip(80):
        kernel[(1,)](tensor, ..)

Kernels must have been imported as what Triton compiles, not as what its interpreter runs.
"""

import ctypes
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.kernels.ahead_of_time import MULTIPROCESSORS, SHARED_MEMORY
from tests.ptx.instructions import Compiler
from tests.ptx.machine import WARP, Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.numbers import UNSIGNED, Array

# Programs that are carried out at once: more of them are faster, and take more memory.
PROGRAMS_AT_ONCE = 64


@contextmanager
def chip(number: int) -> Iterator[list[Compiler]]:
    """number: the compute capability, 80 or 90. Yields the kernels that are launched, each time that they are."""
    # Its property `active` would look for a GPU's.
    before = triton.runtime.driver._active
    driver = PtxDriver(number)
    triton.runtime.driver.set_active(driver)
    try:
        yield driver.launched
    finally:
        triton.runtime.driver._active = before


def launch(
    compiler: Compiler, grid: tuple[int, int, int], values: list[int], tensors: list[Tensor], shared: int
) -> None:
    """values: of the kernel's parameters, as integers. Raises PtxError for whatever a kernel must not do."""
    kernel = compiler.kernel
    memory = GlobalMemory([span for tensor in tensors if (span := _span(tensor))], kernel.threads // WARP)
    sizes = kernel.parameters.items()
    parameters = {
        name: numpy.array([value & (1 << 8 * size) - 1], UNSIGNED[size])
        for (name, size), value in zip(sizes, values, strict=True)
    }
    programs = numpy.arange(grid[0] * grid[1] * grid[2])
    for some in numpy.split(programs, range(PROGRAMS_AT_ONCE, len(programs), PROGRAMS_AT_ONCE)):
        Machine(kernel, memory, parameters, grid, some, shared).run(compiler.step)
    memory.write_back()


def _span(tensor: Tensor) -> tuple[int, Array] | None:
    """The address and the bytes that a tensor's elements lie in; None where it has none."""
    if not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size()
    cells = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    return tensor.data_ptr(), numpy.frombuffer(cells, numpy.uint8)


class PtxDriver(DriverBase):
    """What Triton asks of a driver."""

    def __init__(self, number: int) -> None:
        self.number, self.utils, self.launcher_cls = number, PtxUtilities(number), PtxLauncher
        self.launched: list[Compiler] = []

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, WARP)

    def get_current_device(self) -> int:
        # Kernels keep what they were compiled to by device.
        return self.number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.number, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed here")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def assemble_tensormap_to_arg(self, info: Any, args: Any) -> Any:
        return args


class PtxUtilities:
    def __init__(self, number: int) -> None:
        self.number = number

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """As Triton's own: module, function, registers, spilled registers, most threads."""
        # Triton hands over machine code alone; what it was made from is known to who calls.
        ptx = sys._getframe(1).f_locals["self"].asm["ptx"]
        compiler = Compiler(ptx)
        return compiler, (compiler, shared), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.number],
            "multiprocessor_count": MULTIPROCESSORS[self.number],
            "warpSize": WARP,
        }


class PtxLauncher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.kinds = list(src.signature.values())
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *arguments: Any) -> None:
        """arguments: metadata and hooks, four, and then those of the kernel."""
        compiler, shared = function
        values, tensors = list[int](), list[Tensor]()
        for kind, value in _flat(self.kinds, arguments[4:]):
            if kind.startswith("*"):
                tensors.append(value)
                values.append(value.data_ptr())
            elif kind.startswith("f"):
                values.append(struct.unpack("<I", struct.pack("<f", value))[0])
            else:
                values.append(int(value))
        # Behind them the addresses of scratch memory, of which there is none.
        values += [0] * (len(compiler.kernel.parameters) - len(values))
        launch(compiler, (x, y, z), values, tensors, shared)
        triton.runtime.driver.active.launched.append(compiler)


def _flat(kinds: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Arguments of a kernel that are no constants, those within tuples too."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value
