"""Time of attend and append against PyTorch's attention over 16-bit keys and values: `python -m benchmarks.attention`.

One decoded token per row, on a CUDA device if there is one, else on the CPU; the baseline is the fastest of SDPA's
backends at the same shapes in the same run, taking turns with attend, and for each also the layout in which the query
heads of a group are queries of one head. The share of memory bandwidth counts the bytes that must be read, the state's,
against what a copy reaches on the same device.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvmix_compile.kernels.ops  # noqa: F401  (registers the operators)
from kvmix_compile.kernels.precision import BLOCK_TOKENS, Precision
from kvmix_compile.kernels.state import SiteState, StateLayout
from kvmix_compile.records import circumstances

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
        return StateLayout(self.kv_heads, self.head_dim, self.head_dim, key, value, sinks=64, recent=128)


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
    """Seconds of each operation, and what follows from them."""
    layout = shape.layout()
    state = SiteState.allocate(layout, shape.batch, layout.required_blocks(shape.tokens + 1), dtype, DEVICE)
    fill(state)
    q = torch.randn(shape.batch, shape.query_heads, 1, shape.head_dim, dtype=dtype, device=DEVICE)
    k, v = (q[:, : shape.kv_heads].clone() for _ in range(2))
    lengths = torch.full((shape.batch,), shape.tokens, device=DEVICE)
    starts = torch.zeros_like(lengths)
    inputs = (k, v, lengths, starts, *state.tensors())
    # With a multiple of 32 tokens, sinks and recent ones the next token completes a block, and the one after it none.
    next_inputs = (k, v, lengths + 1, starts, *state.tensors())
    ints = (layout.key.as_ints(), layout.value.as_ints(), layout.recent)
    scale = shape.head_dim**-0.5
    took = seconds(
        {
            "attend": lambda: torch.ops.kvmix.attend.default(q, *inputs, *ints, scale, 0.0, 0),
            "append": lambda: torch.ops.kvmix.append.default(*inputs, *ints),
            "append_token": lambda: torch.ops.kvmix.append.default(*next_inputs, *ints),
        }
        | sdpa(shape, q)
    )
    attend, append, append_token = (took.pop(name) for name in ("attend", "append", "append_token"))
    fastest = min(took.values(), default=None)
    return {
        "attend_seconds": attend,
        "append_seconds": append,
        "append_token_seconds": append_token,
        "sdpa_seconds": took,
        "speedup": fastest and fastest / attend,
        "bandwidth_share": state.nbytes / attend / bandwidth,
        "append_share": (append + (BLOCK_TOKENS - 1) * append_token) / BLOCK_TOKENS / attend,
    }


def fill(state: SiteState) -> None:
    """Random codes with small scales and zero points: float16 zeros where those are read."""
    for tensor in (state.sink_k, state.sink_v, state.tail_k, state.tail_v):
        tensor.normal_()
    # Every byte below 0x3C keeps what is read as float16 below one.
    for tensor in (state.packed_k, state.packed_v):
        tensor.random_(0, 0x3C)


def sdpa(shape: Shape, q: Tensor) -> dict[str, Callable[[], object]]:
    """PyTorch's attention by each of its backends, and in each layout, that it takes these shapes in."""
    size = (shape.batch, shape.kv_heads, shape.tokens + 1, shape.head_dim)
    k, v = (torch.randn(size, dtype=q.dtype, device=q.device) for _ in range(2))
    as_queries = q.view(shape.batch, shape.kv_heads, -1, shape.head_dim)

    def attention(backend: SDPBackend, queries: Tensor) -> Callable[[], object]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(queries, k, v, enable_gqa=True)

        return run

    found = {}
    for backend in BACKENDS:
        for layout, queries in (("", q), ("_AS_QUERIES", as_queries)):
            run = attention(backend, queries)
            # A backend that does not support the shapes or the device, or runs out of memory, raises RuntimeError.
            with suppress(RuntimeError):
                run()
                found[backend.name + layout] = run
    return found


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / seconds({"copy": lambda: target.copy_(source)})["copy"]


def seconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median of several rounds, in which all take turns, after two that warm up."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 + REPEATS):
        for name, run in runs.items():
            took[name].append(_timed(run))
    return {name: median(times[2:]) for name, times in took.items()}


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
