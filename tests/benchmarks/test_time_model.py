"""The model of attend's time on GPUs: a case worked out by hand, and what makes it longer."""

import json
from dataclasses import replace

import pytest

from tests.helpers.benchmark_modules import benchmark

model = benchmark("time_model")

TURNS = {"issued": 400, "tensor": 30, "shared_memory": 100, "integer": 160}
# Bytes are of 2 bits for each of 64 channels, without scales.
KERNEL = model.Kernel(64, (2, 2, 2, 2), 2, 2, 32.0, 64, {1: 4, 8: 1}, 4, 128, 20000, TURNS)
CHIP = model.Chip(
    "a chip", 4, 1e9, 1e12, 65536, 100 * 1024, 64, {"issued": 4, "tensor": 1, "shared_memory": 1, "integer": 2}
)
TOKENS = 192 + 64 * 20


def test_a_case_worked_out_by_hand() -> None:
    found = model.estimate(KERNEL, CHIP, 1, TOKENS)
    # 2 heads of 1280 packed tokens of 32 bytes, and of 192 tokens of 64 channels of 2 bytes for keys and for values.
    assert found.parts["bytes"] == pytest.approx(2 * (1280 * 32 + 192 * 256) / 1e12)
    # 8 programs for 4 multiprocessors: each has 2, of 4 warps and 20 / 4 tiles: 40 of a warp.
    assert found.parts["issued"] == pytest.approx(40 * 400 / 4 / 1e9)
    assert found.parts["integer"] == pytest.approx(40 * 160 / 2 / 1e9)
    assert found.parts["shared_memory"] == pytest.approx(40 * 100 / 1e9)
    assert found.parts["tensor"] == pytest.approx(40 * 30 / 1e9)
    assert found.overlapped == pytest.approx(4e-6)
    # With 128 registers 4 programs would fit, and 2 there are: 2 warps a scheduler, which is idle every other cycle.
    assert KERNEL.resident_programs(CHIP) == 4
    assert found.in_order == pytest.approx(8e-6)
    assert found.unquantized == pytest.approx(2 * 1472 * 256 / 1e12)


def test_programs_are_as_many_as_registers_and_shared_memory_have_room_for() -> None:
    assert replace(KERNEL, registers=255).resident_programs(CHIP) == 2
    assert replace(KERNEL, registers=32, shared_bytes=49 * 1024).resident_programs(CHIP) == 2
    assert replace(KERNEL, registers=16, shared_bytes=0).resident_programs(CHIP) == 64 // 4


@pytest.mark.parametrize("chip", [model.A100, model.H100], ids=lambda chip: chip.name)
def test_more_to_do_takes_longer(chip) -> None:
    def overlapped_and_in_order(kernel=KERNEL, batch=1, tokens=32768) -> tuple[float, float]:
        found = model.estimate(kernel, chip, batch, tokens)
        return found.overlapped, found.in_order

    usual = overlapped_and_in_order()
    more = [
        overlapped_and_in_order(tokens=65536),
        overlapped_and_in_order(batch=8),
        overlapped_and_in_order(replace(KERNEL, turns={unit: 2 * count for unit, count in TURNS.items()})),
        overlapped_and_in_order(replace(KERNEL, kv_heads=400)),
        overlapped_and_in_order(replace(KERNEL, bytes_a_token=KERNEL.bytes_a_token * 200)),
    ]
    assert all(overlapped > usual[0] and in_order > usual[1] for overlapped, in_order in more)
    crowded = replace(KERNEL, registers=255, kv_heads=400)
    assert overlapped_and_in_order(crowded) > overlapped_and_in_order(replace(crowded, registers=64))
    assert (
        model.estimate(KERNEL, model.H100, 1, 32768).overlapped
        < model.estimate(KERNEL, model.A100, 1, 32768).overlapped
    )


def test_what_is_stored_is_estimated_line_by_line(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["time_model"])
    model.main()
    printed = capsys.readouterr().out
    stored = json.loads(model.RESULTS.read_text())["kernels"]
    lines = [line for line in printed.splitlines() if line.startswith(("| A100", "| H100"))]
    assert printed.startswith("A model, nothing of it measured")
    assert len(lines) == 2 * len(stored)
    assert len({line.count("|") for line in printed.splitlines()[2:]}) == 1
