"""Compiles the Triton kernels ahead of time, without a GPU, and says what became of them: what several tests share."""

import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.gpu import append as triton_append
from kvmix_compile.kernels.gpu import attend as triton_attend
from kvmix_compile.kernels.gpu.append import BlockWriter
from kvmix_compile.kernels.gpu.unpack import BlockFormat

# Bytes of shared memory a program may have (CUDA programming guide, technical specifications per compute capability).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
MULTIPROCESSORS = {80: 108, 90: 132}

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADS, SHARED = 8, 4
STATE = {"SINKS": 64, "RECENT": 128, "SLOTS": 128}
# Of pages: no sinks and no ring, and tokens and blocks of a page.
PAGED = {"sink_k": None, "sink_v": None, "SLOTS": 0, "PAGE_TOKENS": 32, "PAGE_BLOCKS": 1}
TABLES = {"raw": "*i32", "packed": "*i32"}


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel. stack_bytes: of a thread, for the registers that are spilled."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes


def compile_kernel(
    kernel: Any, chip: int, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> Compiled:
    """types: of the arguments that are no 32-bit integers and no constants. Where no pages are among the constants,
    what is about pages has its default, which is none.
    """
    if "PAGE_TOKENS" not in constants:
        parameters = inspect.signature(kernel.fn).parameters.values()
        constants |= {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # As at a launch: memory is aligned, and so are strides of whole heads.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.endswith(("_row", "_head", "_token")))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    registers, stack = resources(built.asm["cubin"])
    return Compiled(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=built.metadata.shared,
        ptx=built.asm["ptx"],
        cubin=built.asm["cubin"],
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack that a thread has, as NVIDIA's tool reads them off machine code."""
    report = inspected(cubin, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def inspected(cubin: bytes, *command: str) -> str:
    """What a command says of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def unit_strides(*names: str) -> dict[str, int]:
    return {f"{name}_channel": 1 for name in names}


@dataclass(frozen=True)
class Extras:
    """What attention does beside causal attention."""

    softcap: bool = False
    sliding: bool = False
    chunked: bool = False
    sink_logits: bool = False
    slopes: bool = False


NOTHING, CAPPED_AND_SLIDING = Extras(), Extras(softcap=True, sliding=True)


def compile_attend(
    chip: int,
    key: Precision,
    value: Precision,
    key_dim: int,
    value_dim: int,
    dtype: str,
    tokens: int = 1,
    extras: Extras = NOTHING,
    from_codes: bool = True,
    paged: bool = False,
) -> Compiled:
    """from_codes: False to make the elements in any case. paged: whether the past lies in pages."""
    launch = launch_of(chip, key, value, key_dim, value_dim, dtype, tokens, from_codes)
    elements = dict.fromkeys(("q", "k", "v", "sink_k", "sink_v", "recent_k", "recent_v"), f"*{dtype}")
    types = elements | TABLES | {"packed_k": "*u8", "packed_v": "*u8", "lengths": "*i64", "starts": "*i64"}
    types |= {
        "output": "*fp32",
        "log_sums": "*fp32",
        "scale": "fp32",
        "softcap": "fp32",
        "sink_logits": f"*{dtype}",
        "slopes": "*fp32",
    }
    constants = {
        "HEADS": HEADS,
        "SHARED": SHARED,
        "SOFTCAP": extras.softcap,
        "SLIDING": extras.sliding,
        "CHUNKED": extras.chunked,
        "SPLITS": launch.splits,
        "QUERIES": launch.query_tile,
        **STATE,
        **unit_strides("q", "k", "v"),
        **launch.formats(
            Storage(key=key, value=value, recent=STATE["RECENT"]), key_dim, value_dim, DTYPES[dtype].itemsize
        ),
    }
    constants |= {name: None for name in ("sink_logits", "slopes") if not getattr(extras, name)}
    constants |= PAGED if paged else {}
    options = {
        "num_warps": launch.warps,
        "num_stages": triton_attend.STAGES,
        "maxnreg": triton_attend.REGISTERS,
    }
    return compile_kernel(launch.kernel, chip, types, constants, options)


def launch_of(
    chip: int,
    key: Precision,
    value: Precision,
    key_dim: int,
    value_dim: int,
    dtype: str,
    tokens: int = 1,
    from_codes: bool = True,
    rows: int = 1,
    capacity: int = 32768,
) -> triton_attend.Launch:
    """Of a call with so many new tokens in rows that hold so many."""
    itemsize, storage = DTYPES[dtype].itemsize, Storage(key, value, STATE["RECENT"])
    has_codes = from_codes and triton_attend.has_codes(storage, key_dim, value_dim, DTYPES[dtype])
    return triton_attend.Launch.choose(
        SHARED * tokens, rows * HEADS, capacity, max(key_dim, value_dim), itemsize, MULTIPROCESSORS[chip], has_codes
    )


def compile_append(
    chip: int,
    key: Precision,
    value: Precision,
    key_dim: int,
    value_dim: int,
    dtype: str,
    windowed: bool,
    paged: bool = False,
) -> Compiled:
    elements = dict.fromkeys(("k", "v", "sink_k", "sink_v", "recent_k", "recent_v"), f"*{dtype}")
    types = elements | TABLES | {"packed_k": "*u8", "packed_v": "*u8", "lengths": "*i64", "starts": "*i64"}
    constants = {
        "WINDOWED": windowed,
        "HEADS": HEADS,
        "KEYS": BlockFormat.parts(key, key_dim, DTYPES[dtype].itemsize),
        "KEY_WRITERS": BlockWriter.parts(key, Axis.TOKENS, key_dim),
        "VALUES": BlockFormat.parts(value, value_dim, DTYPES[dtype].itemsize),
        "VALUE_WRITERS": BlockWriter.parts(value, Axis.CHANNELS, value_dim),
        **STATE,
        **unit_strides("k", "v"),
    }
    constants |= PAGED if paged else {}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compile_kernel(triton_append.append_kernel, chip, types, constants, options)


def show(chip: int, what: str, compiled: Compiled) -> None:
    print(
        f"\nsm_{chip} {what}: {compiled.registers} registers, {compiled.stack_bytes} bytes spilled, "
        f"{compiled.shared_bytes} bytes shared"
    )


def check_decoding(chip: int, compiled: Compiled, most_stack_bytes: int = 16) -> None:
    """most_stack_bytes: Triton 3.6 keeps two numbers of a program there, which are needed once a block."""
    assert re.search(r"\b(mma\.sync|wgmma\.mma_async)", compiled.ptx)
    assert compiled.stack_bytes <= most_stack_bytes
    assert compiled.shared_bytes <= SHARED_MEMORY[chip]
