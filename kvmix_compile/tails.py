"""Which tokens stay unquantized: the first and the most recent ones of a row."""

from collections.abc import Mapping
from typing import Literal, get_args

from kvmix_compile.errors import PlanError
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS

Tail = Literal["window", "rpc"]

# (attention sinks, recent tokens) of each tail.
#
# "window": of at most 64 sinks and 128 recent tokens the most, which tell in accuracy (docs/method.md).
#
# "rpc": KVmix (arXiv 2506.08018), Recent Pivotal Context. Of a tail of recent tokens it keeps a tenth (2-bit tensors)
# or a fifth, and quantizes what else fills groups of 32: while decoding, 3 to 34 or 8 to 39 tokens wait. A window of 40
# lets 9 to 40 wait. The paper keeps no sinks.
TAILS: Mapping[Tail, tuple[int, int]] = {"window": (64, 128), "rpc": (0, 40)}


def unquantized_tokens(tail: Tail, sinks: int | None, recent: int | None) -> tuple[int, int]:
    """The sinks and recent tokens asked for, those of `tail` where None is given.

    Raises PlanError where there is no such tail, or no state that keeps so many.
    """
    if not isinstance(tail, str) or tail not in TAILS:
        raise PlanError(f"there is no tail {tail!r}; choose one of {', '.join(get_args(Tail))}")
    usual_sinks, usual_recent = TAILS[tail]
    sinks, recent = usual_sinks if sinks is None else sinks, usual_recent if recent is None else recent
    for name, tokens in (("sinks", sinks), ("recent", recent)):
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise PlanError(f"{name} is a whole number of tokens, not {tokens!r}")
    if sinks < 0 or recent < BLOCK_TOKENS:
        raise PlanError(
            f"sinks={sinks} and recent={recent} are not possible: sinks is 0 or more, recent {BLOCK_TOKENS} (one "
            "block) or more"
        )
    return sinks, recent
