"""How tokens and blocks are laid into pages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import packed_blocks
from kvmix_vllm.pages import RAW_TOKENS, TYPICAL_TOKENS, Kept, PackedPage, paging, raw_bytes, skipped_blocks
from tests.serving.layouts import layout, layouts

DTYPES = (torch.float32, torch.bfloat16)

kept = st.builds(
    Kept,
    page=st.sampled_from(RAW_TOKENS),
    sinks=st.sampled_from([0, 4, 64]),
    recent=st.sampled_from([32, 40, 128]),
) | st.builds(Kept, page=st.sampled_from([8, 32, 96]), sinks=st.just(0), recent=st.just(0), window=st.integers(1, 300))


def block_bytes(dtype: torch.dtype, **options: int) -> tuple[int, int, int]:
    """Bytes of vLLM's block, and tokens of an unquantized page and of a packed one."""
    of_layers = layouts(**options)
    pages = paging(of_layers, dtype)
    raw = sum(one.kv_heads * pages.raw_tokens * raw_bytes(one, dtype) for one in of_layers.values())
    packed = sum(page.nbytes for page in pages.packed.values())
    return max(raw, packed), pages.raw_tokens, next(iter(pages.packed.values())).tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_of_4096_tokens_takes_at_most_two_sevenths_of_16_bits(dtype: torch.dtype) -> None:
    size, raw_tokens, packed_tokens = block_bytes(dtype)
    taken = Kept.of(layout(), raw_tokens).most_pages(TYPICAL_TOKENS) + -(-TYPICAL_TOKENS // packed_tokens)
    at_16_bits = sum(2 * one.kv_heads * (one.key_dim + one.value_dim) for one in layouts().values()) * TYPICAL_TOKENS
    assert 3.5 * taken * size < at_16_bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sinks", "recent"), [(64, 128), (0, 40), (4, 32), (0, 160)])
def test_blocks_fill_whole_pages_where_pages_of_tokens_end(dtype: torch.dtype, sinks: int, recent: int) -> None:
    _, _, tokens = block_bytes(dtype, sinks=sinks, recent=recent)
    skipped = skipped_blocks(layout(sinks=sinks, recent=recent))
    for length in range(0, 3000, tokens):
        places = packed_blocks(length, sinks, recent) + skipped if length > sinks + recent else skipped
        assert places * BLOCK_TOKENS % tokens == 0
        assert places * BLOCK_TOKENS == max(length, skipped * BLOCK_TOKENS)


@given(kept=kept, lengths=st.lists(st.integers(0, 700), min_size=2, max_size=2).map(sorted))
def test_what_is_kept_of_a_longer_row_was_kept_or_is_new(kept: Kept, lengths: list[int]) -> None:
    before, after = lengths
    new = range(before // kept.page, kept.pages(after))
    needed = {page for page in range(kept.pages(after)) if kept.is_kept(page, after)}
    assert needed <= {page for page in range(kept.pages(before)) if kept.is_kept(page, before)} | set(new)


@given(kept=kept, length=st.integers(0, 2000))
def test_a_row_that_grows_by_a_token_holds_no_more_than_is_said(kept: Kept, length: int) -> None:
    held = {
        page for page in range(kept.pages(length + 1)) if kept.is_kept(page, length) or kept.is_kept(page, length + 1)
    }
    assert len(held) <= kept.most_pages(length + 1)


def test_a_window_that_is_never_packed_keeps_itself_alone() -> None:
    window = Kept.of(layout(window=24), page=8)
    assert list(window.recent_pages(100)) == [9, 10, 11, 12]
    assert not window.sink_pages(100)
    assert paging({"one": layout(window=24)}, torch.float32).packed == {}


@given(
    sinks=st.sampled_from([0, 4, 64]),
    recent=st.sampled_from([32, 40, 128]),
    beyond=st.integers(2, 300),
    length=st.integers(0, 1500),
    data=st.data(),
)
def test_of_a_window_that_is_packed_its_own_pages_are_kept(
    sinks: int, recent: int, beyond: int, length: int, data: st.DataObject
) -> None:
    one = layout(window=recent + beyond, sinks=sinks, recent=recent)
    skipped = skipped_blocks(one)
    page = PackedPage(1, 1, data.draw(st.sampled_from([blocks for blocks in (1, 2, 3, 4, 6) if skipped % blocks == 0])))
    kept = page.kept(one)
    assert kept is not None
    first_seen = max(0, length - one.window + 1)
    read = range(max(0, first_seen - sinks) // BLOCK_TOKENS, packed_blocks(length, sinks, recent))
    needed = {(block + skipped) // page.blocks for block in read}
    held = set(kept.recent_pages(length))
    assert needed <= held
    # A row's first block is not its table's first.
    assert not needed or first_seen < sinks or not read[0] or min(held) >= min(needed) - 1


def test_layers_with_a_window_have_as_many_blocks_in_a_page_as_suit_them() -> None:
    """Of six layers five see 512 tokens, as in Gemma 3."""
    of_layers = {str(number): layout(window=512 if number % 6 else 0) for number in range(24)}
    pages = paging(of_layers, torch.bfloat16)
    all_seen, windowed = (pages.packed[name] for name in ("0", "1"))
    assert all_seen.blocks > windowed.blocks
    raw = 24 * 3 * pages.raw_tokens * raw_bytes(layout(), torch.bfloat16)
    size = max(raw, 4 * all_seen.nbytes, 20 * windowed.nbytes)
    kept = windowed.kept(of_layers["1"])
    assert kept is not None and all_seen.kept(of_layers["0"]) is None
    taken = size * (
        Kept.of(layout(), pages.raw_tokens).most_pages(16384) + kept.most_pages(16384) + 16384 // all_seen.tokens
    )
    # What vLLM takes at 16 bits, which keeps the windows alone, too.
    assert 3 * taken < 3 * 128 * 2 * (4 * 16384 + 20 * 512)


@pytest.mark.parametrize("bits", [(1, 2), (1, 2, 1, 2), (1, 2, 3), (2, 2)])
def test_layers_are_no_pattern_that_repeats_itself(bits: tuple[int, ...]) -> None:
    of_layers = {str(number): layout(key_bits=each) for number, each in enumerate(bits)}
    sizes = [page.nbytes for page in paging(of_layers, torch.float32).packed.values()]
    counts = {sizes.count(size) for size in sizes}
    assert len(set(sizes)) == 1 or len(counts) > 1
