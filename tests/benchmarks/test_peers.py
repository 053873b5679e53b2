"""What attend is compared with: each library is called as it documents, and gives attention.

No GPU is needed: the packages for GPUs are replaced by modules that have as much of their interfaces as is used.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.benchmark_modules import benchmark

peers = benchmark("peers")
onnx_runtime = benchmark("peers.onnx_runtime")
flash_infer = benchmark("peers.flash_infer")

HEADS, QUERY_HEADS, DIM = 2, 8, 32


def inputs(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, QUERY_HEADS, 1, DIM), *(torch.randn(rows, HEADS, tokens, DIM) for _ in range(2))


def by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `[rows, tokens, heads, head_dim]`."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


class FlashAttn(ModuleType):
    """The packages flash_attn and flash_attn_interface."""

    def flash_attn_with_kvcache(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        return by_token(q, k_cache, v_cache)


class FlashInfer(ModuleType):
    """The package flashinfer, and its module decode."""

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, workspace: Tensor, kv_layout: str, *, use_tensor_cores: bool) -> None:
            assert kv_layout == "NHD" and workspace.dtype == torch.uint8 and not workspace.any()

        def plan(
            self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
            head_dim: int, page_size: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype,
        ) -> None:  # fmt: skip
            assert {indptr.dtype, indices.dtype, last_page_len.dtype} == {torch.int32}
            assert 1 <= last_page_len.min() <= last_page_len.max() <= page_size
            self.shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
            self.tables = [indices[begin:end] for begin, end in zip(indptr, indptr[1:], strict=False)]
            self.lengths = [
                (len(table) - 1) * page_size + last for table, last in zip(self.tables, last_page_len, strict=True)
            ]

        def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
            query_heads, heads, head_dim, page_size = self.shape
            assert q.shape == (len(self.tables), query_heads, head_dim)
            assert all(cache.shape[1:] == (page_size, heads, head_dim) for cache in paged_kv_cache)
            return FlashInfer.attention(q, paged_kv_cache, self.tables, self.lengths)

    def trtllm_batch_decode_with_kv_cache(
        self, query: Tensor, kv_cache: tuple[Tensor, Tensor], workspace_buffer: Tensor, block_tables: Tensor,
        seq_lens: Tensor, max_seq_len: int, bmm1_scale: float, kv_layout: str,
    ) -> Tensor:  # fmt: skip
        assert kv_layout == "HND" and bmm1_scale == DIM**-0.5 and seq_lens.max() == max_seq_len
        return self.attention(query, [cache.transpose(1, 2) for cache in kv_cache], block_tables, seq_lens)

    @staticmethod
    def attention(q: Tensor, pages: Any, tables: Any, lengths: Any) -> Tensor:
        rows = []
        for queries, table, length in zip(q, tables, lengths, strict=True):
            keys, values = (cache[table].flatten(0, 1)[:length] for cache in pages)
            rows.append(by_token(queries[None, None], keys[None], values[None])[0])
        return torch.cat(rows)


@pytest.fixture
def gpu_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that there are for GPUs, on CPU tensors."""
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, FlashAttn(name))
    for name in ("flashinfer", "flashinfer.decode"):
        monkeypatch.setitem(sys.modules, name, FlashInfer(name))
    # Uncompiled FlexAttention takes the same arguments.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(peers.PEERS, "cpu", peers.PEERS["cuda"])


# A row of one token more than whole pages, of whole pages, and of fewer than one.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("rows", "tokens"), [(1, 33), (3, 33), (2, 48), (2, 9)])
def test_all_for_gpus_give_attention(gpu_packages: None, rows: int, tokens: int) -> None:
    q, k, v = inputs(rows, tokens)
    found, left_out = peers.contenders(q, k, v)
    assert left_out == {}
    faults = {
        name: contender.fault(q) for name, contender in found.items() if "EFFICIENT" not in name and "CUDNN" not in name
    }
    assert {
        "FLASH_ATTENTION", "MATH_AS_QUERIES", "flex-decoding", "flash-attn", "flash-attn-token-major", "flash-attn-3",
        "flash-attn-3-token-major", "flashinfer", "flashinfer-tensor-cores", "flashinfer-trtllm",
    } <= faults.keys()  # fmt: skip
    assert set(faults.values()) == {None}


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface", "flashinfer", "onnx"])
def test_one_that_is_not_installed_is_named_and_the_others_are_had(
    gpu_packages: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(peers.PEERS, "cpu", peers.PEERS["cuda"] | {"onnxruntime": onnx_runtime.group_query_attention})
    monkeypatch.setitem(sys.modules, name, None)
    found, left_out = peers.contenders(*inputs(1, 33))
    peer = {"flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3", "onnx": "onnxruntime"}.get(name, name)
    assert name in left_out[peer] and peer not in found
    assert {"FLASH_ATTENTION", "flex-decoding"} <= found.keys()


def test_pages_lie_in_the_memory_that_there_is() -> None:
    keys = torch.empty(3, HEADS, 33, DIM)
    table = flash_infer.page_table(keys)
    assert table.shape == (3, 3) and table.max() < 3 * 33 // flash_infer.PAGE
    assert len(set(table[:, :2].flatten().tolist())) == 6  # whole pages are each row's own
    with pytest.raises(ValueError, match="fill no page"):
        flash_infer.page_table(keys[:1, :, :9])


# ONNX Runtime


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_within_half_a_step(bits: int) -> None:
    elements = torch.randn(2, HEADS, 40, DIM)
    elements[..., 3] = 0
    scales = onnx_runtime.channel_scales(elements, bits)
    stored = onnx_runtime.quantized(elements, scales, bits)
    assert stored.nbytes == elements.numel() * bits // 8
    assert ((onnx_runtime.codes(stored, bits) * scales - elements).abs() <= scales / 2 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx_runtime_has_three_caches_and_gives_attention(dtype: torch.dtype) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    q, k, v = (tensor.to(dtype) for tensor in inputs(2, 41))
    found = onnx_runtime.group_query_attention(q, k.clone(), v.clone())
    assert {name: contender.bits for name, contender in found.items()} == {
        "onnxruntime": None, "onnxruntime-8": 8, "onnxruntime-4": 4,
    }  # fmt: skip
    assert all(contender.own_threads and contender.fault(q) is None for contender in found.values())
    # The token of the step is stored where there was none.
    step: Callable[[], tuple[Tensor, Tensor]] = found["onnxruntime-4"].held
    for keys, exact in zip(step(), (k, v), strict=True):
        assert (keys - exact).abs().max() <= exact.abs().amax() / 7 / 2 + 1e-3


def test_onnx_runtime_says_what_it_takes() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match="float32 and float16, and this is torch.bfloat16"):
        onnx_runtime.group_query_attention(*(tensor.bfloat16() for tensor in inputs(1, 9)))


def test_quanto_gives_attention_over_what_it_dequantizes() -> None:
    pytest.importorskip("optimum.quanto")
    q, k, v = inputs(1, 200)
    contender = peers.PEERS["cpu"]["quanto"](q, k, v)["quanto-4"]
    assert contender.bits == 4 and contender.fault(q) is None
    keys, _ = contender.held()
    assert 0 < (keys[:, :, :199] - k[:, :, :199]).abs().max() < 1
