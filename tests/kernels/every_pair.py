"""What attend and append are tried on so that every two choices meet: of bits, groups, scales, sizes, dtypes, places
and ways of attending.

Hypothesis draws what nobody thought of, and leaves out half of what everybody would; this leaves out none of it.
"""

from dataclasses import replace
from typing import Any

import torch

from kvmix_compile.kernels.format.precision import BIT_WIDTHS, SCALE_BIT_WIDTHS, Axis, Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import ENDLESS, StateLayout
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.attend_cases import Case
from tests.kernels.covering import Combination
from tests.kernels.layouts import IMPORTANT_BITS

Choices = dict[str, tuple[Any, ...]]

STORING: Choices = {
    "key_bits": (*(((), bits) for bits in BIT_WIDTHS), *IMPORTANT_BITS),
    "key_group": (8, 16, 32),
    "key_scale_bits": SCALE_BIT_WIDTHS,
    "value_bits": BIT_WIDTHS,
    "value_group": (8, 16, 32, 64),
    "value_scale_bits": SCALE_BIT_WIDTHS,
    "dimensions": ((16, 16), (40, 24), (64, 64), (80, 80), (96, 64), (64, 128), (128, 128)),
    "kv_heads": (1, 2),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "state": ((0, 32, 0), (3, 45, 7), (40, 32, 7)),  # sinks, recent tokens, rollback
    "padding": ("none", "part", "all"),  # that leads the first row's chunk
}
APPENDING: Choices = STORING | {
    "window": (0, 1, 40, 100),
    "keeps": ("seen", "window"),  # blocks that hold what is seen, or of a window the window and nothing else
    "chunks": ((110,), (70, 33), (31, 1, 1, 50), (1, 1, 109)),
}
ATTENDING: Choices = STORING | {
    "shared": (1, 2, 3),
    # Of each row, tokens beyond those that are kept unquantized: around where a block is packed, and around several.
    "beyond": ((-1000,), (-1, 0), (1, -30), (31, 32), (33, 1), (64, 95), (129,)),
    "tokens": (1, 2, 9, 33),
    "limit": (
        ("none", 0),
        *(("window", size) for size in (1, 5, 40, 100)),
        *(("chunk", size) for size in (1, 5, 40, 100)),
    ),
    "keeps": ("all", "seen", "window"),  # blocks, as APPENDING; or those of all tokens
    "softcap": (0.0, 2.0),
    "sink_logits": (False, True),
    "slopes": (False, True),
}

# Tokens of a raw page, and blocks of a packed one.
PAGES = ((32, 1), (16, 3), (96, 2))


def precisions(chosen: Combination) -> tuple[Precision, Precision]:
    """Of keys and of values."""
    important_bits, bits = chosen["key_bits"]
    key = Precision(bits, chosen["key_group"], chosen["key_scale_bits"], important_bits)
    return key, Precision(chosen["value_bits"], chosen["value_group"], chosen["value_scale_bits"])


def fits(chosen: Combination) -> bool:
    (key, value), (key_dim, value_dim) = precisions(chosen), chosen["dimensions"]
    return key.fits(key_dim, Axis.TOKENS) and value.fits(value_dim, Axis.CHANNELS)


def layout_of(chosen: Combination) -> StateLayout:
    window = chosen["window"] if "window" in chosen else chosen["limit"][1] if chosen["keeps"] == "window" else 0
    key, value = precisions(chosen)
    sinks, recent, rollback = chosen["state"]
    shape = SiteShape(chosen["kv_heads"], *chosen["dimensions"], window=window)
    layout = StateLayout(shape, key=key, value=value, sinks=sinks, recent=recent, rollback=rollback)
    return replace(layout, sinks=0, recent=ENDLESS) if window and chosen["keeps"] == "window" else layout


def start_of(chosen: Combination, tokens: int) -> int:
    """The padding that leads a chunk of so many tokens."""
    return {"none": 0, "part": tokens // 2, "all": tokens}[chosen["padding"]]


def case_of(chosen: Combination) -> tuple[Case, Weighting]:
    """A case of attend and its weighting, random where nothing is chosen."""
    layout, tokens = layout_of(chosen), chosen["tokens"]
    sinks, recent, _ = chosen["state"]
    lengths = [max(0, sinks + recent + beyond) for beyond in chosen["beyond"]]
    starts = [start_of(chosen, tokens), 0][: len(lengths)]
    case = Case.random(layout, chosen["shared"], lengths, starts, tokens, chosen["dtype"])
    kind, size = chosen["limit"]
    by_head = torch.linspace(-2, 2, case.q.shape[1])
    weighting = Weighting(
        layout.key_dim**-0.5,
        softcap=chosen["softcap"],
        sliding_window=size if kind == "window" else 0,
        attention_chunk=size if kind == "chunk" else 0,
        sink_logits=by_head if chosen["sink_logits"] else None,
        slopes=by_head / 16 if chosen["slopes"] else None,
    )
    return (case.in_window(size) if size and chosen["keeps"] == "seen" else case), weighting
