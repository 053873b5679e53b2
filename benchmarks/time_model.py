"""A model of the time that attend takes on GPUs, from its machine instructions: `python -m benchmarks.time_model`.

Nothing here was measured on a GPU. What is known are the instructions of the loop over packed blocks (`make
instructions`) and what chips can do. From them follows, for a step that decodes, how long memory takes to deliver the
stored bytes, schedulers to issue the instructions, and each unit of a multiprocessor to carry out its own. "Overlapped"
is the largest of these: all work side by side, and nobody waits. "In order" is where a warp issues nothing before its
last result is there, and other warps fill the gaps, as many as registers and shared memory let there be. Left out are
the start of kernels, the joining of splits, what is computed for tokens that are not packed, barriers, and waiting for
memory. Reads of shared memory count as if every thread wanted other bytes, and no two of them the same bank. Both are
compared with 16-bit attention that does nothing but read.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "instructions.json"
SCHEDULERS = 4  # of a multiprocessor
WARP_THREADS = 32
# A warp's registers are handed out in portions (CUDA's occupancy calculator, compute capabilities 8.0 and 9.0).
REGISTER_PORTION = 256
# What a program has of shared memory besides its own (the same).
SHARED_BYTES_OF_THE_SYSTEM = 1024
# From an instruction of ordinary arithmetic to one that needs its result: of Volta (arXiv 1804.06826), taken for the
# later chips' as well.
DEPENDENT_CYCLES = 4
# Sinks and recent tokens, unquantized, as benchmarks.attention has them.
UNPACKED_TOKENS = 64 + 128
UNQUANTIZED_BYTES = 2


@dataclass(frozen=True)
class Chip:
    """What a GPU has and does.

    registers, shared_bytes, warps: that a multiprocessor has room for. turns: of a warp's instructions, how many a
    multiprocessor begins in a clock cycle, for its schedulers ("issued") and for each unit.
    """

    name: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    registers: int
    shared_bytes: int
    warps: int
    turns: Mapping[str, float]


# Multiprocessors, boost clock and bandwidth: NVIDIA's data sheets and white papers of the A100 (80 GB, SXM4) and of the
# H100 (SXM5). Registers, shared memory and warps: CUDA programming guide, technical specifications per compute
# capability. Turns: the same, throughput of native arithmetic instructions, by the 32 threads of a warp; half is
# bfloat16. Shared memory moves 128 bytes a cycle. A tensor instruction is an mma.m16n8k16 of 2048 products, and a
# multiprocessor makes 1024 a cycle (white paper of the A100). Hopper makes twice as many with wgmma, which takes 64
# queries at least and is not counted on.
A100 = Chip(
    "A100", 108, 1.41e9, 2.039e12, 65536, 164 * 1024, 64,
    {"issued": 4, "integer": 2, "float32": 2, "half": 2, "special": 0.5, "shared_memory": 1, "tensor": 0.5},
)  # fmt: skip
H100 = Chip(
    "H100", 132, 1.83e9, 3.35e12, 65536, 228 * 1024, 64,
    {"issued": 4, "integer": 2, "float32": 4, "half": 4, "special": 0.5, "shared_memory": 1, "tensor": 0.5},
)  # fmt: skip
CHIPS = {80: A100, 90: H100}


@dataclass(frozen=True)
class Kernel:
    """How attend was compiled, a row of RESULTS.

    bytes_a_token: packed, of a head's keys and values. tile_tokens: of a turn of the loop. splits: of a row's tokens,
    by the number of rows. warps, registers of a thread, shared_bytes: of a program. turns: of a warp for a tile.
    """

    head_dim: int
    key_tiers: tuple[int, ...]
    value_bits: int
    kv_heads: int
    bytes_a_token: float
    tile_tokens: int
    splits: Mapping[int, int]
    warps: int
    registers: int
    shared_bytes: int
    turns: Mapping[str, int]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Kernel":
        """From how it is stored."""
        alike = ("head_dim", "value_bits", "kv_heads", "bytes_a_token", "tile_tokens", "warps", "registers")
        return cls(
            **{name: row[name] for name in alike},
            key_tiers=tuple(row["key_tiers"]),
            splits={int(batch): splits for batch, splits in row["splits"].items()},
            shared_bytes=row["shared_bytes"],
            turns=row["turns_of_a_warp_for_a_tile"],
        )

    def resident_programs(self, chip: Chip) -> int:
        """How many a multiprocessor has at a time."""
        of_a_warp = ceil(self.registers * WARP_THREADS / REGISTER_PORTION) * REGISTER_PORTION
        by_registers = chip.registers // of_a_warp // self.warps
        by_shared_memory = chip.shared_bytes // (self.shared_bytes + SHARED_BYTES_OF_THE_SYSTEM)
        return min(by_registers, by_shared_memory, chip.warps // self.warps)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step of one layer.

    parts: by what takes so long; "bytes" is memory. waiting: of the schedulers, where each instruction of a warp waits
    for the one before. unquantized: of 16-bit attention, by its bytes alone.
    """

    parts: Mapping[str, float]
    waiting: float
    unquantized: float

    @property
    def bound_by(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def overlapped(self) -> float:
        return self.parts[self.bound_by]

    @property
    def in_order(self) -> float:
        return max(self.overlapped, self.waiting)


def estimate(kernel: Kernel, chip: Chip, batch: int, tokens: int) -> Estimate:
    """Of so many rows of so many tokens; `batch` is one of those that the kernel's splits are known for."""
    heads, packed = batch * kernel.kv_heads, max(tokens - UNPACKED_TOKENS, 0)
    of_an_unpacked_token = 2 * kernel.head_dim * UNQUANTIZED_BYTES
    stored = heads * (packed * kernel.bytes_a_token + (tokens - packed) * of_an_unpacked_token)
    # The multiprocessor that has most to do.
    programs = ceil(heads * kernel.splits[batch] / chip.multiprocessors)
    warp_tiles = programs * kernel.warps * ceil(packed / kernel.tile_tokens / kernel.splits[batch])
    seconds = {unit: warp_tiles * count / chip.turns[unit] / chip.hertz for unit, count in kernel.turns.items()}
    resident = min(programs, kernel.resident_programs(chip)) * kernel.warps / SCHEDULERS
    busy = min(1.0, resident / DEPENDENT_CYCLES)
    return Estimate(
        parts={"bytes": stored / chip.bytes_per_second, **seconds},
        waiting=seconds["issued"] / busy,
        unquantized=heads * tokens * of_an_unpacked_token / chip.bytes_per_second,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_args()
    units = ("bytes", "issued", "integer", "shared_memory", "tensor")
    print("A model, nothing of it measured: microseconds of attend for one layer, bfloat16.\n")
    print(
        "| chip | channels | keys / values, bits | rows |", *(f"{unit.replace('_', ' ')} |" for unit in units), end=""
    )
    print(" overlapped | bound by | in order | 16 bits, by bytes | times as fast |")
    print("|---" * (9 + len(units)) + "|")
    for row in json.loads(options.instructions.read_text())["kernels"]:
        kernel, chip = Kernel.of(row), CHIPS[row["chip"]]
        for batch in kernel.splits:
            print(_line(kernel, chip, batch, units, estimate(kernel, chip, batch, options.tokens)))


def _line(kernel: Kernel, chip: Chip, batch: int, units: tuple[str, ...], found: Estimate) -> str:
    tiers = dict.fromkeys(kernel.key_tiers)
    cells = [
        chip.name,
        kernel.head_dim,
        f"{', '.join(map(str, tiers))} / {kernel.value_bits}",
        batch,
        *(f"{found.parts[unit] * 1e6:.1f}" for unit in units),
        f"{found.overlapped * 1e6:.1f}",
        found.bound_by.replace("_", " "),
        f"{found.in_order * 1e6:.1f}",
        f"{found.unquantized * 1e6:.1f}",
        f"{found.unquantized / found.in_order:.1f} to {found.unquantized / found.overlapped:.1f}",
    ]
    return "".join(f"| {cell} " for cell in cells) + "|"


if __name__ == "__main__":
    main()
