"""What pages cost: attend and append over a state and over pages that hold the same, `python -m benchmarks.pages`.

One decoded token per row, on a CUDA device if there is one, else on the CPU; both take turns. Pages are of 32 tokens or
of one block, in no order, with keys and values, heads and tokens in one buffer, as an engine may have them.
"""

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import DEVICE, DTYPES, HEADS, RESULTS, Shape, fill, seconds
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.ops import append_arguments, attend_arguments
from kvmix_compile.kernels.weighting import Weighting

PAGE_TOKENS, PAGE_BLOCKS = 32, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--bits", type=int, default=2, help="of keys and values")
    parser.add_argument("--heads", type=int, nargs=3, default=HEADS, help="of queries, of keys and values; head_dim")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if DEVICE == "cuda" else "float32")
    options = parser.parse_args()
    rows = []
    for batch in options.batch:
        for tokens in options.tokens:
            shape = Shape(batch, tokens, options.bits, options.bits, *options.heads)
            rows.append({"batch": batch, "tokens": tokens} | measure(shape, DTYPES[options.dtype]))
            print(json.dumps(rows[-1]), flush=True)
    record: dict[str, Any] = {"dtype": options.dtype, "bits": options.bits, "heads": options.heads, "results": rows}
    write_json(RESULTS.with_name(f"pages-{DEVICE}.json"), record | circumstances("pages", torch.device(DEVICE)))


def measure(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of each operation over a state and over pages."""
    layout = shape.layout()
    state = SiteState.allocate(layout, shape.batch, layout.required_blocks(shape.tokens + 1), dtype, DEVICE)
    fill(state)
    pages = as_pages(state, shape.tokens)
    q = torch.randn(shape.batch, shape.query_heads, 1, shape.head_dim, dtype=dtype, device=DEVICE)
    k, v = (q[:, : shape.kv_heads].clone() for _ in range(2))
    # One more than a multiple of 32 tokens, so that no block is completed.
    lengths = torch.full((shape.batch,), shape.tokens + 1, device=DEVICE)
    chunk, operators = Chunk(k, v, lengths, torch.zeros_like(lengths)), torch.ops.kvmix
    attended, paged = (
        attend_arguments(q, chunk, each, layout.storage, Weighting(shape.head_dim**-0.5))[0] for each in (state, pages)
    )
    appended, appended_paged = (append_arguments(chunk, each, layout.storage) for each in (state, pages))
    runs = {
        "attend": lambda: operators.attend.default(*attended),
        "attend_paged": lambda: operators.attend_paged.default(*paged),
        "append": lambda: operators.append.default(*appended),
        "append_paged": lambda: operators.append_paged.default(*appended_paged),
    }
    return seconds(runs)[0]


def as_pages(state: SiteState, tokens: int) -> Pages:
    """Pages for rows of up to `tokens` + 32 tokens, a multiple of 32, with the bytes of a state: its packed blocks, and
    its recent tokens for all that is not packed.
    """
    raw, raw_k, raw_v = _shuffled(state.recent_k, state.recent_v, tokens // PAGE_TOKENS + 1, PAGE_TOKENS)
    packed, packed_k, packed_v = _shuffled(state.packed_k, state.packed_v, state.blocks, PAGE_BLOCKS)
    return Pages(raw, packed, raw_k, raw_v, packed_k, packed_v, sinks=state.sinks)


def _shuffled(keys: Tensor, values: Tensor, pages: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A table of so many pages a row, and pools of keys and of values; these [B, H, n, extent] fill all of them, again
    and again.
    """
    rows, heads, count, extent = keys.shape
    table = torch.randperm(rows * pages, device=keys.device).view(rows, pages)
    both = torch.cat([keys, values], dim=-1).transpose(1, 2)
    place = torch.arange(pages * size, device=keys.device) % count
    pool = both.new_empty(rows * pages, size, heads, both.shape[3])
    pool[table] = both[:, place].unflatten(1, (pages, size))
    pool_of_keys, pool_of_values = pool.transpose(1, 2).split([extent, values.shape[3]], dim=-1)
    return table.int(), pool_of_keys, pool_of_values


if __name__ == "__main__":
    main()
