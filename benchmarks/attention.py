"""Time of attend and append against PyTorch's attention over 16-bit keys and values: `python -m benchmarks.attention`.

One decoded token per row, on a CUDA device if there is one, else on the CPU. The baseline is the fastest of SDPA's
backends and of the package flash-attn, if it is installed. It has the same shapes in the same run, and takes turns with
attend. SDPA is also given the query heads of a group as queries of one head, and flash-attn keys and values in two
layouts. What does not run, or does not fit into memory, is left out, and the reason printed and stored. The share of
memory bandwidth counts the bytes that must be read, the state's, against what a copy reaches on the same device.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.errors import is_out_of_memory, one_line
from kvmix_compile.evaluate.records import circumstances
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.kernels.ops import append_arguments, attend_arguments
from kvmix_compile.kernels.weighting import Weighting

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).parent / "results" / f"attention-{DEVICE}.json"
# More than any cache between memory and processor, so that a copy of as much measures memory.
COPIED_BYTES = 2**30
# Several times the second-level cache of any GPU.
FLUSHED_BYTES = 2**29
LENGTHS = [2048, 8192, 32768, 131072] if DEVICE == "cuda" else [1024, 8192, 32768]
# Query heads, heads of keys and values, channels of a head: as Llama 3.1 8B has them, and SmolLM2-135M.
HEADS = [32, 8, 128] if DEVICE == "cuda" else [9, 3, 64]
REPEATS = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What is timed, by name.
Runs: TypeAlias = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Shape:
    """Rows and tokens of each, heads, and the precision of keys and values."""

    batch: int
    tokens: int
    key_bits: int
    value_bits: int
    query_heads: int
    kv_heads: int
    head_dim: int

    def layout(self) -> StateLayout:
        key, value = Precision(self.key_bits, 32, 4), Precision(self.value_bits, 32, 4)
        return StateLayout(
            SiteShape(self.kv_heads, self.head_dim, self.head_dim), key=key, value=value, sinks=64, recent=128
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32] if DEVICE == "cuda" else [1])
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--bits", nargs="+", default=["2", "3", "3/2", "4"], help="of keys and values, or keys/values")
    parser.add_argument("--heads", type=int, nargs=3, default=HEADS, help="of queries, of keys and values; head_dim")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if DEVICE == "cuda" else "float32")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    bandwidth = copy_bandwidth()
    rows = []
    for shape in shapes(options.batch, options.tokens, options.bits, options.heads):
        row = asdict(shape) | measure(shape, dtype, bandwidth)
        rows.append(row)
        print(json.dumps(row), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    record = {"dtype": str(dtype), "copy_bytes_per_second": bandwidth, "results": rows} | circumstances(
        "attention", torch.device(DEVICE)
    )
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


def shapes(batches: list[int], lengths: list[int], widths: list[str], heads: list[int]) -> Iterator[Shape]:
    for batch in batches:
        for tokens in lengths:
            for bits in widths:
                key_bits, _, value_bits = bits.partition("/")
                yield Shape(batch, tokens, int(key_bits), int(value_bits or key_bits), *heads)


def measure(shape: Shape, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """Seconds of each operation, and what follows from them; None where it did not fit into memory.

    left_out: why what is missing is, by name; "16-bit keys and values" are those of all that attend is compared with.
    """
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # the last shape's memory, so that this one's lies in one piece
    try:
        q = torch.randn(shape.batch, shape.query_heads, 1, shape.head_dim, dtype=dtype, device=DEVICE)
        operations, nbytes = operators(shape, q)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _row({}, 0, bandwidth) | {"left_out": {"attend": one_line(error)}}
    compared, left_out = baselines(shape, q)
    took, failed = seconds(operations | compared)
    return _row(took, nbytes, bandwidth) | {"left_out": left_out | failed}


def _row(took: dict[str, float], nbytes: int, bandwidth: float) -> dict[str, Any]:
    others = dict(took)
    attend, append, append_token = (others.pop(name, None) for name in ("attend", "append", "append_token"))
    fastest = min(others.values(), default=None)
    row: dict[str, Any] = {
        "attend_seconds": attend,
        "append_seconds": append,
        "append_token_seconds": append_token,
        "baseline_seconds": others,
        "speedup": None,
        "bandwidth_share": attend and nbytes / attend / bandwidth,
        "append_share": None,
    }
    if attend and fastest:
        row["speedup"] = fastest / attend
    if attend and append and append_token:
        row["append_share"] = (append + (BLOCK_TOKENS - 1) * append_token) / BLOCK_TOKENS / attend
    return row


def operators(shape: Shape, q: Tensor) -> tuple[Runs, int]:
    """attend and append over a state of random bytes, and how many bytes it has."""
    layout = shape.layout()
    state = SiteState.allocate(layout, shape.batch, layout.required_blocks(shape.tokens + 1), q.dtype, q.device)
    fill(state)
    k, v = (q[:, : shape.kv_heads].clone() for _ in range(2))
    lengths = torch.full((shape.batch,), shape.tokens, device=q.device)
    starts = torch.zeros_like(lengths)
    storage = layout.storage
    records = Chunk(key=k, value=v, lengths=lengths, starts=starts), state, storage
    # With a multiple of 32 tokens, sinks and recent ones the next token completes a block, and the one after it none.
    next_records = Chunk(key=k, value=v, lengths=lengths + 1, starts=starts), state, storage
    attended, _ = attend_arguments(q, *records, Weighting(shape.head_dim**-0.5))
    appended, next_appended = append_arguments(*records), append_arguments(*next_records)
    runs = {
        "attend": lambda: torch.ops.kvmix.attend.default(*attended),
        "append": lambda: torch.ops.kvmix.append.default(*appended),
        "append_token": lambda: torch.ops.kvmix.append.default(*next_appended),
    }
    return runs, state.nbytes


def fill(state: SiteState) -> None:
    """Random codes with small scales and zero points: float16 zeros where those are read."""
    for tensor in (state.sink_k, state.sink_v, state.recent_k, state.recent_v):
        tensor.normal_()
    # Every byte below 0x3C keeps what is read as float16 below one.
    for tensor in (state.packed_k, state.packed_v):
        tensor.random_(0, 0x3C)


def baselines(shape: Shape, q: Tensor) -> tuple[Runs, dict[str, str]]:
    """16-bit attention by all that takes these shapes, and why others do not."""
    size = (shape.batch, shape.kv_heads, shape.tokens + 1, shape.head_dim)
    try:
        k, v = (torch.randn(size, dtype=q.dtype, device=q.device) for _ in range(2))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {}, {"16-bit keys and values": one_line(error)}
    runs, left_out = sdpa(q, k, v), {}
    try:
        runs |= flash_attn(q, k, v)
    except ImportError as error:
        left_out["flash-attn"] = one_line(error)
    for name, run in list(runs.items()):
        try:
            _timed(run)
        except RuntimeError as error:  # the shapes, the dtype or the device are none of its own, or memory is too small
            left_out[name] = one_line(error)
            del runs[name]
    return runs, left_out


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Runs:
    """PyTorch's attention by each of its backends, with each query head by itself and with a group as one head's."""

    def attention(backend: SDPBackend, queries: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(queries, k, v, enable_gqa=True)

        return run

    as_queries = q.view(k.shape[0], k.shape[1], -1, k.shape[3])
    layouts = {"": q, "_AS_QUERIES": as_queries}
    return {
        backend.name + layout: attention(backend, queries)
        for backend in BACKENDS
        for layout, queries in layouts.items()
    }


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Runs:
    """The package flash-attn's attention of a decoded token; raises ImportError where the package is not installed.

    It takes [batch, tokens, heads, head_dim] and returns the same. Keys and values lie in memory as SDPA's do, a head's
    tokens side by side, and in the second as in a cache made for flash-attn, a token's heads side by side: for that the
    same memory is read as that layout, which gives other random numbers and takes no room.
    """
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    queries = q.transpose(1, 2)
    head_major = [cache.transpose(1, 2) for cache in (k, v)]
    token_major = [cache.view(by_head.shape) for cache, by_head in zip((k, v), head_major, strict=True)]
    return {
        "flash-attn": lambda: flash_attn_with_kvcache(queries, *head_major),
        "flash-attn-token-major": lambda: flash_attn_with_kvcache(queries, *token_major),
    }


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    took, _ = seconds({"copy": lambda: target.copy_(source)})
    return 2 * COPIED_BYTES / took["copy"]


def seconds(runs: Runs) -> tuple[dict[str, float], dict[str, str]]:
    """Median of several rounds, in which all take turns, after two that warm up; and which ran out of memory."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    for _ in range(2 + REPEATS):
        for name in [name for name in runs if name not in failed]:
            try:
                took[name].append(_timed(runs[name]))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed[name] = one_line(error)
    return {name: median(times[2:]) for name, times in took.items() if name not in failed}, failed


def _timed(run: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        begin = perf_counter()
        run()
        return perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Nothing that is read may lie in the device's cache. Meanwhile the host queues the run: its time is not counted.
    torch.zeros(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1000


if __name__ == "__main__":
    main()
