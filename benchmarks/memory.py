"""Memory of a process that holds a long context: `python -m benchmarks.memory [--tokens 6000] [--budget 2.3]`.

SmolLM2 reads the same text into transformers' DynamicCache and into a KVMixCache, each in a process of its own, in
chunks. What counts is how much the resident memory of the process has grown once the text is read, beside what the
caches say of themselves. Linux only: resident memory is read from /proc.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import kvmix_compile
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.perplexity import read_rows
from kvmix_compile.evaluate.records import circumstances
from kvmix_compile.models_zoo.smollm2 import load_smollm2

RESULTS = Path(__file__).parent / "results" / "memory.json"
CHUNK = 500
PAGE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--budget", type=float, default=2.3)
    parser.add_argument("--only", choices=("dynamic", "kvmix"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.tokens, options.budget)))
        return
    arguments = ["--tokens", str(options.tokens), "--budget", str(options.budget)]
    rows = {kind: _in_own_process(kind, arguments) for kind in ("dynamic", "kvmix")}
    ratio = rows["dynamic"]["resident_growth"] / rows["kvmix"]["resident_growth"]
    record = {"tokens": options.tokens, "budget": options.budget, "results": rows, "resident_ratio": ratio}
    RESULTS.write_text(json.dumps(record | circumstances("memory", torch.device("cpu")), indent=2) + "\n")
    print(json.dumps(record, indent=2))


def measure(kind: str, tokens: int, budget: float) -> dict[str, Any]:
    """Bytes by which this process grew while it read `tokens` tokens, and the bytes of its cache's tensors."""
    model, tokenizer = load_smollm2()
    ids = token_ids(tokenizer, "\n\n".join(held_out_english()), tokens)[None]
    if kind == "kvmix":
        model = kvmix_compile.apply(model, budget=budget, tokenizer=tokenizer)
    read(model, ids[:, :CHUNK], _cache(kind, model))
    cache, before = _cache(kind, model), _resident()
    read(model, ids, cache)
    grown = _resident() - before
    held = cache.nbytes if kind == "kvmix" else _dynamic_bytes(cache)
    return {"resident_growth": grown, "cache_bytes": held}


def _cache(kind: str, model: Any) -> Any:
    return kvmix_compile.KVMixCache(model) if kind == "kvmix" else DynamicCache()


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any) -> None:
    """Rows of ids, int64 `[rows, tokens]`, into a cache. In chunks: all logits and activations of a long prompt take
    more than its cache.
    """
    for part in ids.split(CHUNK, dim=1):
        read_rows(model, part, cache, logits_to_keep=1)


def _dynamic_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _resident() -> int:
    """Resident bytes of this process, what the allocator keeps for later given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def _in_own_process(kind: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--only", kind, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
