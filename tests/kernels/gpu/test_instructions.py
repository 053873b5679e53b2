"""Machine instructions are counted by the unit that carries them out."""

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests.kernels.gpu.instructions import turns  # noqa: E402


def test_each_instruction_takes_a_turn_of_its_unit_and_of_the_scheduler() -> None:
    found = turns([
        "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@!P0 LOP3.LUT R1, R2, 0xf, RZ, 0xc0, !PT", "PRMT R1, R2, 0x5410, R3",
        "HFMA2.BF16_V2 R4, R5, R6, R7", "FFMA.FTZ R1, R2, R3, R4", "MUFU.EX2 R1, R2", "BAR.SYNC.DEFER_BLOCKING 0x0",
        "@P1 BRA `(.L_x_1)", "UIADD3 UR4, UR5, 0x1, URZ", "LDGSTS.E.64 [R1], [R2.64]",
    ])  # fmt: skip
    assert found == {
        "issued": 10, "tensor": 1, "shared_memory": 0, "special": 1, "float32": 1, "half": 1, "integer": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("LDS R1, [R2]", 1),
        ("LDS.U8 R1, [R2]", 1),
        ("LDS.64 R2, [R4]", 2),
        ("@P0 STS.128 [R1+0x80], R4", 4),
        ("LDSM.16.M88.4 R4, [R2]", 4),
        ("LDSM.16.MT88.2 R4, [R2]", 2),
        ("STSM.16.M88 [R2], R4", 1),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", 1),
    ],
)
def test_shared_memory_takes_a_turn_for_every_128_bytes_of_a_warp(instruction: str, expected: int) -> None:
    assert turns([instruction])["shared_memory"] == expected
