"""Bytes of a cache, from the first tokens on: `python -m benchmarks.cache_bytes [--tokens 10 55 200 1000 6000]`.

SmolLM2, in float32 and in bfloat16, reads one text into transformers' DynamicCache and, compressed, into a KVMixCache;
at each number of tokens the bytes of both caches' tensors are taken, everything counted. One plan serves both dtypes.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvmix_compile
from benchmarks.memory import read
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.models_zoo.smollm2 import load_smollm2

RESULTS = Path(__file__).parent / "results" / "cache-bytes.json"
TOKENS = (10, 55, 200, 1000, 6000)
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--budget", type=float, default=2.3)
    options = parser.parse_args()
    model, tokenizer = load_smollm2()
    ids = token_ids(tokenizer, "\n\n".join(held_out_english()), max(options.tokens))
    plan = kvmix_compile.apply(model, budget=options.budget, tokenizer=tokenizer).kvmix_plan
    rows = []
    for dtype in DTYPES:
        original = model.to(dtype)
        compressed = kvmix_compile.apply(original, plan=plan)
        rows += measure(original, compressed, ids, sorted(options.tokens))
    for row in rows:
        print("{dtype}, {tokens} tokens: {kvmix} bytes, {ratio:.3f} of DynamicCache's {dynamic}".format(**row))
    about = {"model": "smollm2", "budget": options.budget, "results": rows}
    write_json(RESULTS, about | circumstances("benchmarks.cache_bytes", torch.device("cpu")))


def measure(
    original: PreTrainedModel, compressed: PreTrainedModel, ids: Tensor, lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """Of each of the ascending lengths the bytes of both caches, and of as many elements in 16 and in 32 bits.

    ids: int64 [tokens], at least as many as the last length.
    """
    own, past = DynamicCache(), kvmix_compile.KVMixCache(compressed)
    rows = []
    for begin, end in pairwise([0, *lengths]):
        read(original, ids[None, begin:end], own)
        read(compressed, ids[None, begin:end], past)
        kept = [tensor for layer in own.layers for tensor in (layer.keys, layer.values)]
        dynamic, elements = sum(tensor.nbytes for tensor in kept), sum(tensor.numel() for tensor in kept)
        row = {"dtype": str(kept[0].dtype).removeprefix("torch."), "tokens": end, "kvmix": past.nbytes}
        row |= {"dynamic": dynamic, "in_16_bits": 2 * elements, "in_32_bits": 4 * elements}
        rows.append(row | {"ratio": past.nbytes / dynamic})
    return rows


if __name__ == "__main__":
    main()
