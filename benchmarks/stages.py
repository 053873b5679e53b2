"""Seconds and peak memory of every stage of `apply`: `python -m benchmarks.stages [--shapes 1b 3b] [--layers 2 4]`.

Models with the shapes of Llama 3.2 in 1B and 3B, random weights and few layers, each in a process of its own: what one
layer more takes and what is there once can be told apart. Peaks are of what is held beyond what was when `apply` was
called, the weights: resident memory on a CPU (Linux only, read from /proc), allocated memory on a CUDA device.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import kvmix_compile
from kvmix_compile.compiler import CALIBRATION_LENGTH
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.report import Report

RESULTS = Path(__file__).parent / "results"
# Those of meta-llama/Llama-3.2-1B and -3B.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "head_dim": 64},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "head_dim": 128},
}
ALIKE: dict[str, Any] = {
    "vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
WHOLE = "apply"


@dataclass
class Meter:
    """Seconds and peak bytes of stages, which may lie one within the other."""

    device: torch.device
    before: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    under_way: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._give_back()
        self._begin()
        self.before = self._peak()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What the block takes goes to the stage of this name."""
        self._give_back()
        self._note_peaks()
        self.under_way.append(name)
        start = perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start
            self._note_peaks()
            self.under_way.pop()

    def _give_back(self) -> None:
        """What the allocator keeps for later, which is no stage's."""
        gc.collect()
        if self.device.type == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def _note_peaks(self) -> None:
        """Since the last time, for all stages that are under way."""
        for name in self.under_way:
            self.peaks[name] = max(self.peaks.get(name, 0), self._peak() - self.before)
        self._begin()

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(shape: str, layers: int, dtype: str, rows: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak bytes of each stage of `apply` on one model, and the bytes of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], **ALIKE, num_hidden_layers=layers)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    calibration = torch.randint(config.vocab_size, (rows, CALIBRATION_LENGTH))
    meter = metered_apply(model, calibration, device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"shape": shape, "layers": layers, "weights": weights, "seconds": meter.seconds, "peak_bytes": meter.peaks}


def metered_apply(model: nn.Module, calibration: Tensor, device: torch.device) -> Meter:
    """What each stage of `apply` takes."""
    meter, timed = Meter(device), Report.timed

    @contextmanager
    def metered(report: Report, stage: str) -> Iterator[None]:
        with meter.stage(stage), timed(report, stage):
            yield

    with patch.object(Report, "timed", metered), meter.stage(WHOLE):
        kvmix_compile.apply(model, budget=2.3, calibration=calibration)
    return meter


def in_own_process(shape: str, layers: int, arguments: Sequence[str]) -> dict[str, Any]:
    """What `measure` gives."""
    command = [sys.executable, "-m", "benchmarks.stages", "--only", shape, str(layers), *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each stage: of each model seconds and the peak in MB."""
    stages = dict.fromkeys(stage for result in results for stage in result["seconds"])
    heads = [f"{result['shape']}, {result['layers']} layers" for result in results]
    lines = [f"| stage | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    weights = (f"{result['weights'] / 1e6:.0f} MB" for result in results)
    lines.append(f"| (weights) | {' | '.join(weights)} |")
    for stage in stages:
        cells = (f"{r['seconds'].get(stage, 0):.1f} s, {r['peak_bytes'].get(stage, 0) / 1e6:.0f} MB" for r in results)
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=8, help=f"of calibration, of {CALIBRATION_LENGTH} tokens each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, help="where to write the results (default: by device and dtype)")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.only:
        shape, layers = options.only
        print(json.dumps(measure(shape, int(layers), options.dtype, options.rows, device)))
        return
    arguments = ["--dtype", options.dtype, "--rows", str(options.rows), "--device", options.device]
    results = [in_own_process(shape, layers, arguments) for shape in options.shapes for layers in options.layers]
    print(table(results))
    about = {"dtype": options.dtype, "rows": options.rows, "tokens_a_row": CALIBRATION_LENGTH, "results": results}
    path = options.results or RESULTS / f"stages-{device.type}-{options.dtype}.json"
    write_json(path, about | circumstances("benchmarks.stages", device))


if __name__ == "__main__":
    main()
