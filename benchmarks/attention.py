"""Time of attend and append against the attention of others: `python -m benchmarks.attention`.

One decoded token per row, on a CUDA device if there is one, else on the CPU. It is compared with the strongest that
there are for the device (benchmarks/peers), which have the same shapes in the same run and take turns with attend: with
those over 16-bit keys and values, or the dtype asked for, and with those that quantize them too. Speed-ups are over the
fastest of each kind. All are held against exact attention first. What is not installed, does not run, does not fit into
memory, or gives something else is left out, and the reason printed and stored. The share of memory bandwidth counts the
bytes that must be read, the state's, against what a copy reaches on the same device.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.errors import is_out_of_memory, one_line
from benchmarks.peers import Contenders, contenders, installed_packages
from kvmix_compile.evaluate.records import circumstances
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.kernels.ops import append_arguments, attend_arguments
from kvmix_compile.kernels.weighting import Weighting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).parent / "results" / f"attention-{DEVICE}.json"
# More than any cache between memory and processor, so that a copy of as much measures memory.
COPIED_BYTES = 2**30
# Several times the second-level cache of any GPU, as often as the host needs to queue whatever is timed.
FLUSHED_BYTES = 2**29
FLUSHES = 4
# Idle threads go on looking for work for a while: GNU's OpenMP for some milliseconds.
SECONDS_TO_FALL_ASLEEP = 0.02
# Of the inputs on which everyone's result is held against exact attention: no multiple of a page or a tile.
CHECKED_ROWS, CHECKED_TOKENS = 2, 197
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
    wrong = faults(options.heads, dtype)
    rows: list[dict[str, Any]] = []
    told: set[str] = set()
    for shape in shapes(options.batch, options.tokens, options.bits, options.heads):
        row = asdict(shape) | measure(shape, dtype, bandwidth, wrong)
        rows.append(row)
        for name, reason in row["left_out"].items():
            if name not in told:
                print(f"left out: {name} ({reason})", flush=True)
        told |= row["left_out"].keys()
        print(json.dumps(row), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    record = {"dtype": str(dtype), "copy_bytes_per_second": bandwidth, "results": rows} | circumstances(
        "attention", torch.device(DEVICE), installed_packages()
    )
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


def shapes(batches: list[int], lengths: list[int], widths: list[str], heads: list[int]) -> Iterator[Shape]:
    for batch in batches:
        for tokens in lengths:
            for bits in widths:
                key_bits, _, value_bits = bits.partition("/")
                yield Shape(batch, tokens, int(key_bits), int(value_bits or key_bits), *heads)


def faults(heads: list[int], dtype: torch.dtype) -> dict[str, str]:
    """Of those that run and whose result for a small input is not attention, by name, how far it is from it."""
    query_heads, kv_heads, head_dim = heads
    q = torch.randn(CHECKED_ROWS, query_heads, 1, head_dim, dtype=dtype, device=DEVICE)
    k, v = (torch.randn(CHECKED_ROWS, kv_heads, CHECKED_TOKENS, head_dim, dtype=dtype, device=DEVICE) for _ in range(2))
    found = {}
    for name, contender in contenders(q, k, v)[0].items():
        try:
            fault = contender.fault(q)
        except Exception:  # it is tried again for each shape, and its reason told there
            continue
        if fault:
            found[name] = fault
    return found


def measure(
    shape: Shape, dtype: torch.dtype, bandwidth: float, wrong: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Seconds of each operation, and what follows from them; None where it did not fit into memory.

    wrong: who is not to be timed, and why. left_out: why what is missing is, by name; "16-bit keys and values" are
    those of all that attend is compared with.
    """
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # the last shape's memory, so that this one's lies in one piece
    try:
        q = torch.randn(shape.batch, shape.query_heads, 1, shape.head_dim, dtype=dtype, device=DEVICE)
        operations, nbytes = operators(shape, q)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _row({}, {}, 0, bandwidth) | {"left_out": {"attend": one_line(error)}}
    compared, left_out = baselines(shape, q, wrong or {})
    own_threads = {name: contender.run for name, contender in compared.items() if contender.own_threads}
    shared_threads = {name: contender.run for name, contender in compared.items() if not contender.own_threads}
    took, failed = seconds(operations | shared_threads, own_threads)
    bits = {name: contender.bits for name, contender in compared.items()}
    return _row(took, bits, nbytes, bandwidth) | {"left_out": left_out | failed}


def _row(took: dict[str, float], bits: Mapping[str, int | None], nbytes: int, bandwidth: float) -> dict[str, Any]:
    """bits: of a contender's keys and values; None for those that are not quantized."""
    attend, append, append_token = (took.get(name) for name in ("attend", "append", "append_token"))
    unquantized = {name: took[name] for name in bits if name in took and bits[name] is None}
    quantized = {name: took[name] for name in bits if name in took and bits[name] is not None}
    row: dict[str, Any] = {
        "attend_seconds": attend,
        "append_seconds": append,
        "append_token_seconds": append_token,
        "baseline_seconds": unquantized,
        "quantized_seconds": quantized,
    }
    for others, ratio in ((unquantized, "speedup"), (quantized, "speedup_over_quantized")):
        fastest = min(others, key=others.__getitem__, default=None)
        row[ratio] = others[fastest] / attend if attend and fastest else None
        row[f"{ratio}_is_over"] = fastest
    row["bandwidth_share"] = attend and nbytes / attend / bandwidth
    row["append_share"] = None
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


def baselines(shape: Shape, q: Tensor, wrong: Mapping[str, str]) -> tuple[Contenders, dict[str, str]]:
    """All that take these shapes and are not wrong, and why others do not."""
    size = (shape.batch, shape.kv_heads, shape.tokens + 1, shape.head_dim)
    try:
        k, v = (torch.randn(size, dtype=q.dtype, device=q.device) for _ in range(2))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {}, {"16-bit keys and values": one_line(error)}
    found, left_out = contenders(q, k, v)
    for name, contender in list(found.items()):
        try:
            if name in wrong:
                raise ValueError(wrong[name])
            _timed(contender.run)
        except Exception as error:  # the shapes, the dtype or the device are none of its own, or memory is too small
            left_out[name] = one_line(error)
            del found[name]
    return found, left_out


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    took, _ = seconds({"copy": lambda: target.copy_(source)})
    return 2 * COPIED_BYTES / took["copy"]


def seconds(*pools: Runs) -> tuple[dict[str, float], dict[str, str]]:
    """Median of several rounds, in which all take turns, after two that warm up; and which ran out of memory.

    pools: by whose threads they run. Where there are several, each pool's threads are woken up by a run that is not
    timed, when those of the pool before it are asleep: else they would take processors from each other.
    """
    took: dict[str, list[float]] = {name: [] for runs in pools for name in runs}
    failed: dict[str, str] = {}

    def attempt(name: str, run: Callable[[], object], timed: bool = True) -> None:
        try:
            duration = _timed(run)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed[name] = one_line(error)
        else:
            took[name] += [duration] if timed else []

    several = sum(map(bool, pools)) > 1
    for _ in range(2 + REPEATS):
        for pool in pools:
            names = [name for name in pool if name not in failed]
            if several and names:
                sleep(SECONDS_TO_FALL_ASLEEP)
                attempt(names[-1], pool[names[-1]], timed=False)
            for name in names:
                if name not in failed:
                    attempt(name, pool[name])
    return {name: median(times[2:]) for name, times in took.items() if name not in failed}, failed


def _timed(run: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        begin = perf_counter()
        run()
        return perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Nothing that is read may lie in the device's cache. Meanwhile the host queues the run: its time is not counted.
    for _ in range(FLUSHES):
        torch.zeros(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1000


if __name__ == "__main__":
    main()
