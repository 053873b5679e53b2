"""The benchmark of attention: what it compares with, and that what does not fit is left out and let go of."""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.benchmark_modules import benchmark

attention = benchmark("attention")
attention_of_others = benchmark("peers")
Contender = attention_of_others.Contender

SHAPE = attention.Shape(2, 288, 2, 2, query_heads=6, kv_heads=2, head_dim=32)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DEVICE", "cpu")
    monkeypatch.setattr(attention, "REPEATS", 1)


class Peers:
    """What stands in for the peers of a CPU: contenders, and those that cannot be had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, **peers: Callable[[Tensor, Tensor, Tensor], dict[str, Contender]]) -> None:
        self.monkeypatch.setitem(attention_of_others.PEERS, "cpu", attention_of_others.PEERS["cpu"] | peers)


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Peers:
    return Peers(monkeypatch)


def scaled(factor: float, bits: int | None = None, own_threads: bool = False) -> Callable[..., dict[str, Contender]]:
    """A peer whose result is attention's times a factor."""

    def peer(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Contender]:
        def run() -> Tensor:
            return factor * F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return {f"times {factor}": Contender(run, lambda: (k, v), bits, own_threads)}

    return peer


def missing(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Contender]:
    raise ModuleNotFoundError("No module named 'flash_attn'")


def refusing(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Contender]:
    def refuse() -> Tensor:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    return {"refusing": Contender(refuse, lambda: (k, v))}


def test_attend_is_compared_with_the_fastest_of_each_kind(add: Peers) -> None:
    add(exact=scaled(1.0), quantized=scaled(2.0, bits=4, own_threads=True))
    row = attention.measure(SHAPE, torch.float32, 1e9)
    took, quantized = row["baseline_seconds"], row["quantized_seconds"]
    assert {"MATH", "MATH_AS_QUERIES", "times 1.0"} <= set(took) and "times 2.0" in quantized
    assert (
        row["speedup"]
        == min(took.values()) / row["attend_seconds"]
        == took[row["speedup_is_over"]] / row["attend_seconds"]
    )
    assert row["speedup_over_quantized"] == min(quantized.values()) / row["attend_seconds"]


def test_one_whose_result_is_not_attention_is_left_out(add: Peers) -> None:
    add(exact=scaled(1.0), wrong=scaled(1.1))
    wrong = attention.faults([6, 2, 32], torch.float32)
    assert list(wrong) == ["times 1.1"]
    row = attention.measure(SHAPE, torch.float32, 1e9, wrong)
    assert "not attention" in row["left_out"]["times 1.1"]
    assert "times 1.0" in row["baseline_seconds"] and "times 1.1" not in row["baseline_seconds"]


def test_what_is_not_installed_and_what_refuses_is_left_out_and_named(add: Peers) -> None:
    add(**{"flash-attn": missing, "another": refusing})
    row = attention.measure(SHAPE, torch.float32, 1e9)
    assert "flash_attn" in row["left_out"]["flash-attn"] and row["speedup"]
    assert "only support fp16" in row["left_out"]["refusing"]
    assert "FLASH_ATTENTION" in row["baseline_seconds"]


def test_threads_of_another_pool_are_asleep_before_one_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(attention, "sleep", lambda seconds: order.append("sleep"))
    took, _ = attention.seconds(
        {name: lambda name=name: order.append(name) for name in "ab"}, {"c": lambda: order.append("c")}
    )
    assert order[:7] == ["sleep", "b", "a", "b", "sleep", "c", "c"]
    assert list(took) == ["a", "b", "c"]
    order.clear()
    attention.seconds({"a": lambda: order.append("a")}, {})
    assert set(order) == {"a"}


def exhausted(*arguments: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 GiB.")


def test_memory_that_ends_in_a_timed_round_ends_one_contender() -> None:
    rooms = iter([True, True, False])

    def at_last() -> None:
        if not next(rooms):
            exhausted()

    took, failed = attention.seconds({"large": at_last, "small": lambda: None})
    assert list(took) == ["small"] and "34.00 GiB" in failed["large"]


def test_an_error_of_another_kind_is_not_left_out() -> None:
    def wrong() -> None:
        raise RuntimeError("the numbers are wrong")

    with pytest.raises(RuntimeError, match="numbers are wrong"):
        attention.seconds({"attend": wrong})


def test_a_state_that_does_not_fit_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], add: Peers
) -> None:
    add(**{"flash-attn": missing})
    # More than any machine has.
    too_many = str(2**50)
    arguments = ["--tokens", too_many, "1024", "--bits", "2", "--dtype", "float32", "--heads", "6", "2", "32"]
    monkeypatch.setattr(sys, "argv", ["attention", "--batch", "1", *arguments])
    monkeypatch.setattr(attention, "RESULTS", tmp_path / "attention.json")
    monkeypatch.setattr(attention, "COPIED_BYTES", 2**20)
    attention.main()
    rows = json.loads((tmp_path / "attention.json").read_text())["results"]
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines if line.startswith("{")] == rows
    assert sum(line.startswith("left out: flash-attn (ModuleNotFoundError") for line in lines) == 1
    large, small = rows
    assert large["tokens"] == 2**50 and large["attend_seconds"] is large["speedup"] is None
    assert "can't allocate memory" in large["left_out"]["attend"]
    assert small["speedup"] and "attend" not in small["left_out"]
    assert list(small) == list(large)


def test_without_room_for_16_bits_attend_is_still_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    randn = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *size, **options: (randn if len(size) > 1 else exhausted)(*size, **options)
    )
    row = attention.measure(SHAPE, torch.float32, 1e9)
    assert row["attend_seconds"] and row["speedup"] is None and row["baseline_seconds"] == {}
    assert list(row["left_out"]) == ["16-bit keys and values"]


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> int:
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("fails", [None, "allocate", "scaled_dot_product_attention"])
def test_nothing_holds_on_to_a_shapes_tensors(monkeypatch: pytest.MonkeyPatch, fails: str | None) -> None:
    attention.measure(SHAPE, torch.float32, 1e9)
    if fails:
        monkeypatch.setitem(attention_of_others.PEERS, "cpu", {"SDPA": attention_of_others.PEERS["cpu"]["SDPA"]})
        monkeypatch.setattr(attention.SiteState if fails == "allocate" else F, fails, exhausted)
    gc.collect()
    before = tensors()
    row = attention.measure(SHAPE, torch.float32, 1e9)
    assert tensors() == before
    assert bool(row["speedup"]) == (fails is None)
