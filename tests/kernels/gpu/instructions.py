"""Machine instructions of the loop over packed blocks, as attend is compiled for a step that decodes, without a GPU.

`python -m tests.kernels.gpu.instructions` counts them for each kernel of KERNELS and chip, by the unit of a
multiprocessor that carries them out, and benchmarks.time_model reads what it writes. A minute of a core: `make
instructions`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton

from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Precision
from kvmix_compile.kernels.gpu import attend as triton_attend
from tests.helpers.repository import ROOT
from tests.kernels.ahead_of_time import DTYPES, HEADS, SHARED, compile_attend, inspected, launch_of

RESULTS = ROOT / "benchmarks" / "results" / "instructions.json"
CHIPS = (80, 90)
# The dimensions of a head, bits of the tiers of its keys, bits of values.
KERNELS = [
    *((dim, (bits,) * 4, bits) for dim in (64, 128) for bits in (2, 3, 4)),
    *((dim, (3,) * 4, 2) for dim in (64, 128)),
    *((dim, tiers, 2) for tiers in ((8, 4, 2, 1), (4, 3, 2, 2), (4, 2, 2, 1)) for dim in (64, 128)),
]
DTYPE = "bf16"
SCALE_BITS = 4
# Rows and tokens of each that launches are chosen for.
BATCHES = (1, 8)
TOKENS = 32768

# Who carries out what. Units work side by side; what stands nowhere here only takes its turn to be issued: barriers,
# branches, reads of global memory, and what is the same for a whole warp (opcodes that begin with U).
UNITS = {
    "tensor": ("HMMA",),
    "shared_memory": ("LDS", "LDSM", "STS", "STSM", "SHFL"),
    "special": ("MUFU",),
    "float32": ("FADD", "FMUL", "FFMA", "IMAD"),
    "half": ("HADD2", "HFMA2", "HMUL2"),
    "integer": (
        "F2F", "F2FP", "F2I", "FMNMX", "FSEL", "FSETP", "I2F", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "PRMT",
        "SEL", "SGXT", "SHF", "VIADD",
    ),
}  # fmt: skip
# Instructions of shared memory that move more than 4 bytes a thread, 128 of a warp, take as many turns.
WIDTHS = {"64": 2, "128": 4}
MATRICES = re.compile(r"MT?\d+\.(\d)")


def first_loop(cubin: bytes) -> list[str]:
    """Machine instructions between the first branch backwards and where it leads: the loop over packed blocks."""
    listing = inspected(cubin, triton.knobs.nvidia.nvdisasm.path, "-c")
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                return instructions[labels[target[1]] :]
    raise AssertionError("there is no loop in this kernel")


def turns(instructions: Sequence[str]) -> dict[str, int]:
    """How many turns they take of each unit, and, as "issued", of the scheduler."""
    found = Counter[str]({"issued": len(instructions)})
    for instruction in instructions:
        opcode, *modifiers = re.sub(r"^@\S+\s+", "", instruction).split()[0].split(".")
        unit = next((unit for unit, opcodes in UNITS.items() if opcode in opcodes), None)
        if unit == "shared_memory":
            matrices = MATRICES.search(".".join(modifiers))
            widest = max((WIDTHS.get(modifier, 1) for modifier in modifiers), default=1)
            found[unit] += int(matrices[1]) if matrices else widest
        elif unit:
            found[unit] += 1
    return {unit: found[unit] for unit in ("issued", *UNITS)}


def counted(chip: int, dim: int, tiers: Sequence[int], value_bits: int) -> dict[str, Any]:
    """A kernel's row of the results."""
    key, value = Precision.of_tiers(tiers, 32, SCALE_BITS), Precision(value_bits, 32, SCALE_BITS)
    compiled = compile_attend(chip, key, value, dim, dim, DTYPE)
    launches = {batch: launch_of(chip, key, value, dim, dim, DTYPE, rows=batch, capacity=TOKENS) for batch in BATCHES}
    launch = launches[BATCHES[0]]
    units, tile_tokens = turns(first_loop(compiled.cubin)), launch.blocks * BLOCK_TOKENS
    return {
        "chip": chip,
        "head_dim": dim,
        "key_tiers": list(tiers),
        "value_bits": value_bits,
        "kv_heads": HEADS,
        "query_heads": SHARED * HEADS,
        "bytes_a_token": sum(precision.block_bytes(dim, DTYPES[DTYPE].itemsize) for precision in (key, value))
        / BLOCK_TOKENS,
        "tile_tokens": tile_tokens,
        "splits": {str(batch): chosen.splits for batch, chosen in launches.items()},
        "warps": launch.warps,
        "registers": compiled.registers,
        "shared_bytes": compiled.shared_bytes,
        "instructions_an_element": units["issued"] * launch.warps * triton_attend.WARP / (2 * tile_tokens * dim),
        "turns_of_a_warp_for_a_tile": units,
    }


def rows() -> Iterator[dict[str, Any]]:
    """Of every kernel on every chip."""
    for chip in CHIPS:
        for kernel in KERNELS:
            row = counted(chip, *kernel)
            print(f"sm_{chip}", *kernel, f"{row['instructions_an_element']:.2f} instructions an element", flush=True)
            yield row


def main() -> None:
    """Writes RESULTS."""
    record = {"dtype": DTYPE, "tokens": TOKENS, "triton": triton.__version__, "kernels": list(rows())}
    write_json(RESULTS, record | circumstances("tests.kernels.gpu.instructions", torch.device("cpu")))


if __name__ == "__main__":
    main()
