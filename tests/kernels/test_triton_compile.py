"""The Triton kernels compile ahead of time, without a GPU, for the chips they are meant for.

Decode kernels must not spill registers, no kernel may want more shared memory than the chip has, and attention must run
on the tensor cores. `pytest -s` shows the table.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kvmix_compile.kernels import triton_append, triton_attend  # noqa: E402
from kvmix_compile.kernels.precision import BLOCK_TOKENS, Axis, Precision  # noqa: E402
from kvmix_compile.kernels.triton_append import BlockWriter  # noqa: E402
from kvmix_compile.kernels.triton_unpack import BlockFormat  # noqa: E402

# Bytes of shared memory a program may have (CUDA programming guide, technical specifications per compute capability).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
MULTIPROCESSORS = {80: 108, 90: 132}

ITEMSIZE = 2
HEADS = 8
STATE = {"SINKS": 64, "RECENT": 128, "SLOTS": 128}


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str


def compile_kernel(
    kernel: Any, chip: int, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> Compiled:
    """types: of the arguments that are no 32-bit integers and no constants."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # As at a launch: memory is aligned, and so are strides of whole heads.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith(("_row", "_head", "_token"))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    ptx = built.asm["ptx"]
    registers, spilled = assemble(ptx)
    return Compiled(registers, spilled, built.metadata.shared, ptx)


def assemble(ptx: str, output: str = "/dev/null") -> tuple[int, int]:
    """Registers of a thread, and the bytes of them that are spilled, as NVIDIA's assembler says."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", "-o", output, file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    assert registers and spilled, report
    return int(registers[1]), int(spilled[1])


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
) -> Compiled:
    shared, widest = 4, max(key_dim, value_dim)
    launch = triton_attend.Launch.choose(shared * tokens, HEADS, 32768, widest, MULTIPROCESSORS[chip])
    elements = dict.fromkeys(("q", "k", "v", "sink_k", "sink_v", "tail_k", "tail_v"), f"*{dtype}")
    types = elements | {"packed_k": "*u8", "packed_v": "*u8", "lengths": "*i64", "starts": "*i64"}
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
        "SHARED": shared,
        "KEYS": BlockFormat.parts(key, key_dim, ITEMSIZE),
        "VALUE": BlockFormat.parts(value, value_dim, ITEMSIZE)[0],
        "SOFTCAP": extras.softcap,
        "SLIDING": extras.sliding,
        "CHUNKED": extras.chunked,
        "SPLITS": launch.splits,
        "QUERIES": launch.query_tile,
        "BLOCKS": launch.blocks,
        **STATE,
        **unit_strides("q", "k", "v"),
    }
    constants |= {name: None for name in ("sink_logits", "slopes") if not getattr(extras, name)}
    options = {
        "num_warps": launch.warps,
        "num_stages": triton_attend.STAGES,
        "maxnreg": triton_attend.REGISTERS,
    }
    return compile_kernel(triton_attend.attend_kernel, chip, types, constants, options)


def compile_append(chip: int, key: Precision, value: Precision, key_dim: int, value_dim: int, dtype: str) -> Compiled:
    elements = dict.fromkeys(("k", "v", "sink_k", "sink_v", "tail_k", "tail_v"), f"*{dtype}")
    types = elements | {"packed_k": "*u8", "packed_v": "*u8", "lengths": "*i64", "starts": "*i64"}
    constants = {
        "HEADS": HEADS,
        "KEYS": BlockFormat.parts(key, key_dim, ITEMSIZE),
        "KEY_WRITERS": BlockWriter.parts(key, Axis.TOKENS, key_dim),
        "VALUES": BlockFormat.parts(value, value_dim, ITEMSIZE),
        "VALUE_WRITERS": BlockWriter.parts(value, Axis.CHANNELS, value_dim),
        **STATE,
        **unit_strides("k", "v"),
    }
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compile_kernel(triton_append.append_kernel, chip, types, constants, options)


def show(chip: int, what: str, compiled: Compiled) -> None:
    print(
        f"\nsm_{chip} {what}: {compiled.registers} registers, {compiled.spilled_bytes} bytes spilled, "
        f"{compiled.shared_bytes} bytes shared"
    )


# (key bits, value bits, scale bits, key_dim, value_dim, dtype): every width, dimension and dtype at least once.
CONFIGURATIONS = [
    (1, 8, 4, 64, 64, "fp16"),
    (2, 2, 4, 64, 64, "bf16"),
    (3, 2, 4, 80, 80, "bf16"),
    (8, 1, 16, 96, 96, "fp16"),
    (2, 2, 4, 128, 128, "bf16"),
    (4, 3, 16, 128, 128, "fp16"),
    (16, 16, 16, 128, 128, "bf16"),
    (3, 3, 4, 192, 128, "bf16"),
    (2, 4, 4, 256, 256, "bf16"),
]


def precisions(key_bits: int, value_bits: int, scale_bits: int, value_dim: int) -> tuple[Precision, Precision]:
    group = 32 if value_dim % 32 == 0 else value_dim // 5
    return Precision(key_bits, 32, scale_bits), Precision(value_bits, group, scale_bits)


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(("key_bits", "value_bits", "scale_bits", "key_dim", "value_dim", "dtype"), CONFIGURATIONS)
def test_decoding(
    chip: int, key_bits: int, value_bits: int, scale_bits: int, key_dim: int, value_dim: int, dtype: str
) -> None:
    key, value = precisions(key_bits, value_bits, scale_bits, value_dim)
    extras = CAPPED_AND_SLIDING if key_dim == 256 else NOTHING
    compiled = compile_attend(chip, key, value, key_dim, value_dim, dtype, extras=extras)
    show(chip, f"attend {key_bits}/{value_bits} bits, dims {key_dim}/{value_dim}, {dtype}", compiled)
    check_decoding(chip, compiled)


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(
    ("important_bits", "bits", "scale_bits", "dim"),
    [((4, 4), 2, 4, 64), ((4,), 2, 4, 64), ((3, 3), 2, 16, 80), ((4, 3), 2, 4, 128), ((8, 8), 4, 4, 256)],
)
def test_decoding_with_important_channels(
    chip: int, important_bits: tuple[int, ...], bits: int, scale_bits: int, dim: int
) -> None:
    key, value = precisions(bits, 2, scale_bits, dim)
    key = replace(key, important_bits=important_bits)
    extras = CAPPED_AND_SLIDING if dim == 256 else NOTHING
    compiled = compile_attend(chip, key, value, dim, dim, "bf16", extras=extras)
    show(chip, f"attend {key.quarters}/2 bits, dim {dim}", compiled)
    check_decoding(chip, compiled)


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(
    ("extras", "dim"),
    [
        (Extras(chunked=True), 128),
        (Extras(sink_logits=True, sliding=True), 64),
        (Extras(slopes=True), 64),
        (Extras(slopes=True), 128),
        (Extras(softcap=True, sliding=True, sink_logits=True, slopes=True), 128),
    ],
)
def test_decoding_with_more_than_causal_attention(chip: int, extras: Extras, dim: int) -> None:
    key, value = precisions(3, 2, 4, dim)
    compiled = compile_attend(chip, key, value, dim, dim, "bf16", extras=extras)
    show(chip, f"attend 3/2 bits, dim {dim}, {extras}", compiled)
    check_decoding(chip, compiled)


def check_decoding(chip: int, compiled: Compiled) -> None:
    assert re.search(r"\b(mma\.sync|wgmma\.mma_async)", compiled.ptx)
    assert compiled.spilled_bytes == 0
    assert compiled.shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(("bits", "most"), [(2, 5.5), (4, 5.5), (8, 7.0), (3, 6.5)])
def test_the_loop_over_packed_blocks_is_short(chip: int, bits: int, most: float) -> None:
    """Of a thread's instructions for each element: above about five a GPU computes longer than it reads memory. What is
    demanded is what was reached; 13 to 17 before codes were converted several at a time and metadata decoded once.
    """
    dim = 128
    key, value = precisions(bits, bits, 4, dim)
    compiled = compile_attend(chip, key, value, dim, dim, "bf16")
    launch = triton_attend.Launch.choose(4, HEADS, 32768, dim, MULTIPROCESSORS[chip])
    elements = 2 * launch.blocks * BLOCK_TOKENS * dim / (32 * launch.warps)
    count = instructions_of_first_loop(compiled.ptx) / elements
    print(f"\nsm_{chip} attend {bits}/{bits} bits, dim {dim}: {count:.1f} instructions an element")
    assert count < most


def instructions_of_first_loop(ptx: str) -> int:
    """Machine instructions between the first branch backwards and where it leads: the loop over packed blocks."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        assemble(ptx, file.name)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    place = 0
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = place
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            place += 1
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                return place - labels[target[1]]
    raise AssertionError("there is no loop in this kernel")


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_chunks_of_many_tokens(chip: int, dim: int) -> None:
    compiled = compile_attend(chip, Precision(2, 32, 4), Precision(2, 32, 4), dim, dim, "bf16", tokens=64)
    show(chip, f"attend, 64 tokens, 2/2 bits, dim {dim}", compiled)
    assert compiled.shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize(
    ("key_bits", "value_bits", "scale_bits", "dim", "important_bits"),
    [(2, 3, 4, 128, ()), (4, 16, 16, 80, ()), (2, 2, 4, 128, (4, 4)), (2, 2, 4, 64, (4,))],
)
def test_appending(
    chip: int, key_bits: int, value_bits: int, scale_bits: int, dim: int, important_bits: tuple[int, ...]
) -> None:
    key, value = precisions(key_bits, value_bits, scale_bits, dim)
    key = replace(key, important_bits=important_bits)
    compiled = compile_append(chip, key, value, dim, dim, "bf16")
    show(chip, f"append {key.quarters}/{value_bits} bits, dim {dim}", compiled)
    assert compiled.shared_bytes <= SHARED_MEMORY[chip]
