"""The benchmark of attention: what it compares with, and that what does not fit is left out and let go of."""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.benchmark_modules import benchmark

attention = benchmark("attention")

SHAPE = attention.Shape(2, 288, 2, 2, query_heads=6, kv_heads=2, head_dim=32)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DEVICE", "cpu")
    monkeypatch.setattr(attention, "REPEATS", 1)


class FlashAttn(ModuleType):
    """The package flash-attn as far as it is used: attention in the layout that it documents, and what it was given."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def flash_attn_with_kvcache(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        self.given.append((q, k_cache, v_cache))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k_cache, v_cache))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    module = FlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def test_flash_attn_gets_the_layout_that_it_documents(flash_attn: FlashAttn) -> None:
    q, k, v = torch.randn(2, 6, 1, 32), torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 32)
    runs = attention.flash_attn(q, k, v)
    results = {name: run().transpose(1, 2) for name, run in runs.items()}
    assert [[tuple(tensor.shape) for tensor in given] for given in flash_attn.given] == [
        [(2, 1, 6, 32), (2, 40, 2, 32), (2, 40, 2, 32)]
    ] * 2
    torch.testing.assert_close(results["flash-attn"], attention.sdpa(q, k, v)["MATH"]())
    _, keys, values = flash_attn.given[1]
    assert keys.is_contiguous() and values.is_contiguous() and keys.data_ptr() == k.data_ptr()
    by_head = keys.transpose(1, 2), values.transpose(1, 2)
    torch.testing.assert_close(results["flash-attn-token-major"], attention.sdpa(q, *by_head)["MATH"]())


def test_flash_attn_is_one_of_those_that_attend_is_compared_with(flash_attn: FlashAttn) -> None:
    row = attention.measure(SHAPE, torch.float32, 1e9)
    took = row["baseline_seconds"]
    assert {"flash-attn", "flash-attn-token-major", "MATH", "MATH_AS_QUERIES"} <= set(took)
    assert row["speedup"] == min(took.values()) / row["attend_seconds"]


def test_without_flash_attn_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    row = attention.measure(SHAPE, torch.float32, 1e9)
    assert "flash_attn" in row["left_out"]["flash-attn"] and row["speedup"]
    assert "FLASH_ATTENTION" in row["baseline_seconds"] and "flash-attn" not in row["baseline_seconds"]


def test_what_refuses_is_left_out_with_its_reason(flash_attn: FlashAttn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    monkeypatch.setattr(flash_attn, "flash_attn_with_kvcache", refuse)
    row = attention.measure(SHAPE, torch.float32, 1e9)
    assert "only support fp16" in row["left_out"]["flash-attn"] and row["speedup"]


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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # More than any machine has.
    too_many = str(2**50)
    arguments = ["--tokens", too_many, "1024", "--bits", "2", "--dtype", "float32", "--heads", "6", "2", "32"]
    monkeypatch.setattr(sys, "argv", ["attention", "--batch", "1", *arguments])
    monkeypatch.setattr(attention, "RESULTS", tmp_path / "attention.json")
    monkeypatch.setattr(attention, "COPIED_BYTES", 2**20)
    attention.main()
    rows = json.loads((tmp_path / "attention.json").read_text())["results"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
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
        monkeypatch.setattr(attention.SiteState if fails == "allocate" else F, fails, exhausted)
    gc.collect()
    before = tensors()
    row = attention.measure(SHAPE, torch.float32, 1e9)
    assert tensors() == before
    assert bool(row["speedup"]) == (fails is None)
