"""The instructions of NVIDIA's that are written into the kernels, carried out one by one: the interpreter has none."""

import re

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from kvmix_compile.kernels.gpu.unpack import HALVED, field_place, pairs_assembly

DTYPES = {"fp16": (tl.float16, torch.float16), "bf16": (tl.bfloat16, torch.bfloat16)}
WORD = 2**32 - 1


def run(assembly: str, registers: dict[str, int], dtype: torch.dtype = torch.float16) -> dict[str, int]:
    """Registers of 32 bits before and after."""
    values = dict(registers)
    for line in re.sub(r"\.reg [^;]*;", "", assembly.strip("{} \n")).split(";"):
        if not line.strip():
            continue
        operation, operands = line.strip().split(maxsplit=1)
        target, *names = operands.split(", ")
        sources = [values[name] if name in values else int(name, 0) for name in names]
        values[target] = carry_out(operation, sources, dtype) & WORD
    return values


def carry_out(operation: str, sources: list[int], dtype: torch.dtype) -> int:
    """As the PTX manual has it."""
    name, a, *rest = operation.split(".")[0], *sources
    if name in ("sub", "fma", "min"):
        x, *others = (pair(source, dtype) for source in sources)
        if name == "min":
            return word(x.minimum(others[0]), dtype)
        return word(x * others[0] + others[1] if name == "fma" else x - others[0], dtype)
    if name == "lop3":
        b, c, table = rest
        bits = [table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32)]
        return sum(bit << i for i, bit in enumerate(bits))
    if name == "prmt":
        b, selectors = rest
        both = (a | b << 32).to_bytes(8, "little")
        return int.from_bytes(bytes(both[selectors >> 4 * i & 7] for i in range(4)), "little")
    if name == "shf":
        return (a | rest[0] << 32) >> (32 - rest[1] % 32)
    simple = {"and": lambda: a & rest[0], "add": lambda: a + rest[0], "shr": lambda: a >> rest[0], "mov": lambda: a}
    return simple[name]()


def pair(register: int, dtype: torch.dtype) -> torch.Tensor:
    halves = torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32).to(torch.int16)
    return halves.view(dtype).double()


def word(numbers: torch.Tensor, dtype: torch.dtype) -> int:
    low, high = (int(bits) & 0xFFFF for bits in numbers.to(dtype).view(torch.int16))
    return low | high << 16


def test_the_higher_of_two_bits_takes_the_lower_ones_place() -> None:
    for byte in range(256):
        halved = run(HALVED.value, {"$1": byte * 0x01010101, "$2": 0xFF00FF00})["$0"]
        lower, higher = byte & 0x55, byte >> 1 & 0x55
        assert [halved >> 8 * i & 0x55 for i in range(4)] == [higher, lower, higher, lower]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_pairs_are_codes_times_scale_and_zero_point(bits: int, name: str) -> None:
    if (bits, name) == (8, "bf16"):
        pytest.skip("these go by float32")
    triton_dtype, dtype = DTYPES[name]
    assembly, place = pairs_assembly(bits, triton_dtype), field_place(bits, triton_dtype)
    fields = 8 // (2 if bits == 3 else bits)
    scales, zero_points = torch.tensor([0.75, 0.03, 1.5, 0.011]), torch.tensor([-1.25, 0.5, 0.0, -0.017])
    if name == "bf16":
        scales = (scales / 2**place).to(dtype)
        stored = (zero_points - 128 * scales.float()).to(dtype)
    else:
        scales, stored = scales.to(dtype), zero_points.to(dtype)
    registers = {"$8": word(scales[:2], dtype), "$9": word(scales[2:], dtype)}
    registers |= {"$10": word(stored[:2], dtype), "$11": word(stored[2:], dtype)}
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randint(256, (2, 40, 4), generator=generator)
    # The four are neighbours in a slice, or of several slices: of any fields.
    alike = torch.arange(fields)[:, None].expand(fields, 4)
    for field in (*alike, *torch.randint(fields, (fields, 4), generator=generator)):
        shift = field * 8 // fields
        registers |= {f"${4 + i}": rotation for i, rotation in enumerate(((place - shift) % 32).tolist())}
        codes = low >> shift & (3 if bits == 3 else 2**bits - 1)
        if bits == 3:
            codes += (high >> shift & 1) << 2
        steps = scales.double() * (2**place if name == "bf16" else 1)
        expected = codes * steps + zero_points
        for row in range(len(low)):
            registers["$2"], registers["$3"] = (sum(int(b) << 8 * i for i, b in enumerate(p[row])) for p in (low, high))
            after = run(assembly, registers, dtype)
            elements = torch.cat([pair(after["$0"], dtype), pair(after["$1"], dtype)])
            error = (elements - expected[row]).abs()
            # Of the offset's zero point and of the element itself, half a unit in the last place each.
            reach = (2**bits + 1) * steps + zero_points.abs()
            assert (error <= reach * torch.finfo(dtype).eps).all()


def test_elements_beyond_float16_become_its_largest_number() -> None:
    assembly = pairs_assembly(8, tl.float16)
    scale, zero_point = torch.full((2,), 300.0), torch.tensor([60000.0, -60000.0])
    registers = dict.fromkeys(("$3", "$4", "$5", "$6", "$7"), 0)
    registers |= {"$2": 0xFFFFFFFF, "$8": word(scale, torch.float16), "$9": word(scale, torch.float16)}
    registers |= {"$10": word(zero_point, torch.float16), "$11": word(zero_point, torch.float16)}
    after = run(assembly, registers)
    assert pair(after["$0"], torch.float16).tolist() == pair(after["$1"], torch.float16).tolist() == [65504.0, 16496.0]
