"""Every kernel that dispatch can choose compiles, for every chip: all pairs of bits, groups, scales, dimensions,
dtypes, ways of attending and numbers of tokens, over a state and over pages.

Twenty minutes of a core: `make sweep` runs it and prints the table. CI compiles the sample of test_triton_compile.py.
"""

from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from kvmix_compile.kernels.format.precision import BIT_WIDTHS, SCALE_BIT_WIDTHS, Axis, Precision  # noqa: E402
from kvmix_compile.passes.measure.sensitivity import CANDIDATE_TIERS  # noqa: E402
from tests.kernels.ahead_of_time import (  # noqa: E402
    CAPPED_AND_SLIDING,
    NOTHING,
    SHARED_MEMORY,
    Extras,
    check_decoding,
    compile_append,
    compile_attend,
    show,
)
from tests.kernels.covering import Combination, covering, named  # noqa: E402

pytestmark = pytest.mark.sweep

CHIPS = (80, 90)
TIERS = (*((bits,) * 4 for bits in BIT_WIDTHS), *CANDIDATE_TIERS)
DIMENSIONS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (64, 128))
COMMON: dict[str, tuple[Any, ...]] = {
    "chip": CHIPS,
    "tiers": TIERS,
    "value_bits": BIT_WIDTHS,
    "scale_bits": SCALE_BIT_WIDTHS,
    "key_group": (8, 16, 32),
    "value_group": (16, 32, 64),
    "dimensions": DIMENSIONS,
    "dtype": ("fp16", "bf16", "fp32"),
    "paged": (False, True),
}
ATTENDING = {
    "extras": (
        NOTHING,
        CAPPED_AND_SLIDING,
        Extras(chunked=True),
        Extras(sink_logits=True, sliding=True),
        Extras(slopes=True),
    ),
    "tokens": (1, 8, 64),
}


def precisions(chosen: Combination) -> tuple[Precision, Precision]:
    key = Precision.of_tiers(chosen["tiers"], chosen["key_group"], chosen["scale_bits"])
    return key, Precision(chosen["value_bits"], chosen["value_group"], chosen["scale_bits"])


def fits(chosen: Combination) -> bool:
    key, value = precisions(chosen)
    key_dim, value_dim = chosen["dimensions"]
    return key.fits(key_dim, Axis.TOKENS) and value.fits(value_dim, Axis.CHANNELS)


@pytest.mark.parametrize("chosen", covering(COMMON | ATTENDING, fits), ids=named)
def test_attend_compiles(chosen: Combination) -> None:
    compiled = compile_attend(
        *(chosen["chip"], *precisions(chosen), *chosen["dimensions"], chosen["dtype"], chosen["tokens"]),
        extras=chosen["extras"],
        paged=chosen["paged"],
    )
    show(chosen["chip"], f"attend, {named(chosen)}", compiled)
    assert compiled.shared_bytes <= SHARED_MEMORY[chosen["chip"]]
    if chosen["tokens"] == 1 and chosen["dtype"] != "fp32":
        # Where keys have many parts, a few numbers that are needed once a block.
        check_decoding(chosen["chip"], compiled, most_stack_bytes=256)


@pytest.mark.parametrize("chosen", covering(COMMON | {"windowed": (False, True)}, fits), ids=named)
def test_append_compiles(chosen: Combination) -> None:
    compiled = compile_append(
        *(chosen["chip"], *precisions(chosen), *chosen["dimensions"], chosen["dtype"]),
        windowed=chosen["windowed"],
        paged=chosen["paged"],
    )
    show(chosen["chip"], f"append, {named(chosen)}", compiled)
    assert compiled.shared_bytes <= SHARED_MEMORY[chosen["chip"]]
