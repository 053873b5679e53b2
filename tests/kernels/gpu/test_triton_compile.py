"""The Triton kernels compile ahead of time, without a GPU, for the chips they are meant for.

Decode kernels must not spill registers, no kernel may want more shared memory than the chip has, and attention must run
on the tensor cores. `pytest -s` shows the table.
"""

from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS, Precision  # noqa: E402
from kvmix_compile.kernels.gpu import attend as triton_attend  # noqa: E402
from tests.kernels.ahead_of_time import (  # noqa: E402
    CAPPED_AND_SLIDING,
    NOTHING,
    SHARED_MEMORY,
    Extras,
    check_decoding,
    compile_append,
    compile_attend,
    launch_of,
    show,
)
from tests.kernels.gpu.instructions import first_loop  # noqa: E402

# `make test` compiles for the one, `make test-compiled` for the other.
CHIPS = [80, pytest.param(90, marks=pytest.mark.choices)]

# (key bits, value bits, scale bits, key_dim, value_dim, dtype): every width, dimension and dtype at least once.
CONFIGURATIONS = [
    (1, 8, 4, 64, 64, "fp16"),
    (2, 2, 4, 64, 64, "bf16"),
    (3, 2, 4, 80, 80, "bf16"),
    (8, 1, 16, 96, 96, "fp16"),
    (2, 2, 4, 128, 128, "bf16"),
    (4, 3, 16, 128, 128, "fp16"),
    (16, 16, 16, 128, 128, "bf16"),
    (3, 3, 4, 192, 128, "bf16"),
    (2, 4, 4, 256, 256, "bf16"),
]


def precisions(key_bits: int, value_bits: int, scale_bits: int, value_dim: int) -> tuple[Precision, Precision]:
    group = 32 if value_dim % 32 == 0 else value_dim // 5
    return Precision(key_bits, 32, scale_bits), Precision(value_bits, group, scale_bits)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("key_bits", "value_bits", "scale_bits", "key_dim", "value_dim", "dtype"), CONFIGURATIONS)
def test_decoding(
    chip: int, key_bits: int, value_bits: int, scale_bits: int, key_dim: int, value_dim: int, dtype: str
) -> None:
    key, value = precisions(key_bits, value_bits, scale_bits, value_dim)
    extras = CAPPED_AND_SLIDING if key_dim == 256 else NOTHING
    compiled = compile_attend(chip, key, value, key_dim, value_dim, dtype, extras=extras)
    show(chip, f"attend {key_bits}/{value_bits} bits, dims {key_dim}/{value_dim}, {dtype}", compiled)
    check_decoding(chip, compiled)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("important_bits", "bits", "scale_bits", "dim"),
    [((4, 4), 2, 4, 64), ((4,), 2, 4, 64), ((3, 3), 2, 16, 80), ((4, 3), 2, 4, 128), ((8, 8), 4, 4, 256)],
)
def test_decoding_with_important_channels(
    chip: int, important_bits: tuple[int, ...], bits: int, scale_bits: int, dim: int
) -> None:
    key, value = precisions(bits, 2, scale_bits, dim)
    key = replace(key, important_bits=important_bits)
    extras = CAPPED_AND_SLIDING if dim == 256 else NOTHING
    compiled = compile_attend(chip, key, value, dim, dim, "bf16", extras=extras)
    show(chip, f"attend {key.tiers}/2 bits, dim {dim}", compiled)
    check_decoding(chip, compiled)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("extras", "dim"),
    [
        (Extras(chunked=True), 128),
        (Extras(sink_logits=True, sliding=True), 64),
        (Extras(slopes=True), 64),
        (Extras(slopes=True), 128),
        (Extras(softcap=True, sliding=True, sink_logits=True, slopes=True), 128),
    ],
)
def test_decoding_with_more_than_causal_attention(chip: int, extras: Extras, dim: int) -> None:
    key, value = precisions(3, 2, 4, dim)
    compiled = compile_attend(chip, key, value, dim, dim, "bf16", extras=extras)
    show(chip, f"attend 3/2 bits, dim {dim}, {extras}", compiled)
    check_decoding(chip, compiled)


# The dtype, dimensions of a head, bits of the keys of some channels and of the others, bits of values; and what was
# reached: by elements, then from codes.
LOOPS = [
    *(("fp16", 128, (), bits, bits, most) for bits, most in ((2, 6.3), (4, 6.3))),
    *(("bf16", 128, (), bits, bits, most) for bits, most in ((8, 7.0),)),
    *(("bf16", 128, (), bits, bits, most) for bits, most in ((1, 3.3), (2, 3.5), (3, 4.6), (4, 3.9))),
    *(("bf16", dim, (), 2, 2, most) for dim, most in ((64, 4.2), (96, 4.4))),
    *(("bf16", dim, (8, 4, 2), 1, 2, most) for dim, most in ((64, 6.3), (128, 4.5))),
    *(("bf16", dim, (4, 3), 2, 2, most) for dim, most in ((64, 6.2), (128, 4.3))),
]


@pytest.mark.parametrize(
    ("chip", "dtype", "dim", "important_bits", "bits", "value_bits", "most"),
    [(80 if place % 2 else 90, *loop) for place, loop in enumerate(LOOPS)],
)
def test_the_loop_over_packed_blocks_is_short(
    chip: int, dtype: str, dim: int, important_bits: tuple[int, ...], bits: int, value_bits: int, most: float
) -> None:
    """Of a thread's instructions for each element: above about three a GPU computes longer than it reads memory. What
    is demanded is what was reached.
    """
    key, value = precisions(bits, value_bits, 4, dim)
    key = replace(key, important_bits=important_bits)
    compiled = compile_attend(chip, key, value, dim, dim, dtype)
    launch = launch_of(chip, key, value, dim, dim, dtype)
    elements = 2 * launch.blocks * BLOCK_TOKENS * dim / (triton_attend.WARP * launch.warps)
    count = len(first_loop(compiled.cubin)) / elements
    show(chip, f"attend {key.tiers}/{value_bits} bits, dim {dim}, {count:.1f} instructions an element", compiled)
    assert count < most
    check_decoding(chip, compiled)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_chunks_of_many_tokens(chip: int, dim: int) -> None:
    compiled = compile_attend(chip, Precision(2, 32, 4), Precision(2, 32, 4), dim, dim, "bf16", tokens=64)
    show(chip, f"attend, 64 tokens, 2/2 bits, dim {dim}", compiled)
    assert compiled.shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("key_bits", "value_bits", "scale_bits", "dim", "important_bits", "windowed"),
    [
        (2, 3, 4, 128, (), True),
        (4, 16, 16, 80, (), False),
        (2, 2, 4, 128, (4, 4), False),
        (2, 2, 4, 64, (4,), True),
    ],
)
def test_appending(
    chip: int,
    key_bits: int,
    value_bits: int,
    scale_bits: int,
    dim: int,
    important_bits: tuple[int, ...],
    windowed: bool,
) -> None:
    key, value = precisions(key_bits, value_bits, scale_bits, dim)
    key = replace(key, important_bits=important_bits)
    compiled = compile_append(chip, key, value, dim, dim, "bf16", windowed)
    show(chip, f"append {key.tiers}/{value_bits} bits, dim {dim}", compiled)
    assert compiled.shared_bytes <= SHARED_MEMORY[chip]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("dtype", "most"), [("bf16", 4.0), ("fp16", 7.5)])
def test_over_pages(chip: int, dtype: str, most: float) -> None:
    """most: instructions of a thread for each element, from codes and by elements; over a state 3.2 and 6.0."""
    dim, precision = 128, Precision(2, 32, 4)
    attending = compile_attend(chip, precision, precision, dim, dim, dtype, paged=True)
    launch = launch_of(chip, precision, precision, dim, dim, dtype)
    elements = 2 * launch.blocks * BLOCK_TOKENS * dim / (triton_attend.WARP * launch.warps)
    count = len(first_loop(attending.cubin)) / elements
    show(chip, f"attend over pages, {dtype}, {count:.1f} instructions an element", attending)
    assert count < most
    check_decoding(chip, attending)
    appending = compile_append(chip, precision, precision, dim, dim, dtype, windowed=False, paged=True)
    show(chip, f"append over pages, {dtype}", appending)
    assert appending.shared_bytes <= SHARED_MEMORY[chip]
