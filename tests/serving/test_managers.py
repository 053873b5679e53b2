"""Pages that requests hold in vLLM's scheduler, with vLLM's own manager of the whole cache."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from kvmix_compile.kernels.format.state import packed_blocks
from kvmix_vllm.managers import register_managers
from kvmix_vllm.pages import paging
from kvmix_vllm.specs import PackedSpec, PackedWindowSpec, RawSpec
from tests.serving.layouts import layout

PAGES = paging({"one": layout()}, torch.bfloat16)
RAW, PACKED, SHARED = PAGES.raw_tokens, PAGES.packed["one"].tokens, PAGES.shared_tokens
HASHED = min(RAW, PACKED)
# Of a layer beside it, which sees a window.
WINDOWED = layout(window=400)
WINDOWED_PAGE = replace(PAGES.packed["one"], blocks=1)
OF_WINDOW = WINDOWED_PAGE.kept(WINDOWED)
assert OF_WINDOW is not None and WINDOWED_PAGE.tokens % HASHED == SHARED % WINDOWED_PAGE.tokens == 0


class Cache:
    """A pool of so many blocks, and the requests that hold some. windowed: of a layer that sees a window, too."""

    def __init__(self, blocks: int = 1000, windowed: bool = False) -> None:
        config = VllmConfig()
        with set_current_vllm_config(config):
            register_managers(config)
        init_none_hash(sha256)
        groups = [
            KVCacheGroupSpec(["one"], PackedSpec.of(layout(), PAGES.packed["one"])),
            KVCacheGroupSpec(["one.raw"], RawSpec.of(layout(), PAGES, torch.bfloat16)),
        ]
        self.kept = groups[1].kv_cache_spec.kept
        self.windowed = windowed
        if windowed:
            groups.append(KVCacheGroupSpec(["windowed"], PackedWindowSpec.of(WINDOWED, WINDOWED_PAGE)))
        self.manager = KVCacheManager(
            KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups, prefix_cache_retention_interval=0
            ),
            max_model_len=8192,
            scheduler_block_size=SHARED,
            hash_block_size=HASHED,
        )

    def request(self, name: str, ids: list[int]) -> Request:
        hasher = get_request_block_hasher(HASHED, sha256)
        params = SamplingParams(max_tokens=100)
        return Request(name, ids, params, None, block_hasher=hasher)

    def begin(self, request: Request, tokens: int) -> int:
        """A request's first step, of at most so many tokens; returns those that it found."""
        found, length, boundary = self.manager.get_computed_blocks(request)
        request.shared_prefix_boundary = boundary
        tokens = min(tokens, request.num_tokens - length)
        added = self.manager.allocate_slots(request, tokens, length, found)
        assert added is not None
        request.num_computed_tokens = length + tokens
        return length

    def step(self, request: Request, tokens: int) -> bool:
        """Another step of it; whether there were pages for that."""
        if self.manager.allocate_slots(request, tokens) is None:
            return False
        request.num_computed_tokens += tokens
        return True

    def read(self, request: Request, chunk: int) -> int:
        """All of its prompt, in chunks; returns what it found."""
        found = self.begin(request, chunk)
        while request.num_computed_tokens < request.num_tokens:
            assert self.step(request, min(chunk, request.num_tokens - request.num_computed_tokens))
        return found

    def write(self, request: Request, token: int) -> bool:
        """One token more, as when it is generated."""
        request.append_output_token_ids(token)
        return self.step(request, 1)

    def tables(self, request: Request) -> tuple[list[int], list[int]]:
        """Its block tables: of packed pages and of others; 0 where there is none."""
        packed, raw, *_ = self.manager.get_block_ids(request.request_id)
        return packed, raw

    def of_window(self, request: Request) -> list[int]:
        """Its block table of packed pages of the layer with a window."""
        return self.manager.get_block_ids(request.request_id)[2]

    def held(self, request: Request) -> int:
        return sum(bool(block) for table in self.manager.get_block_ids(request.request_id) for block in table)


@pytest.fixture(params=[False, True], ids=["", "windowed"])
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(windowed=request.param)


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_kept(cache: Cache, request: Request) -> None:
    """A row has the pages that its next token reads or writes."""
    length = request.num_computed_tokens
    packed, raw = cache.tables(request)
    assert all(raw[page] for page in range(cache.kept.pages(length)) if cache.kept.is_kept(page, length))
    assert all(packed) and len(packed) * PACKED >= length
    check_window(cache, request, length)


def check_window(cache: Cache, request: Request, length: int) -> None:
    """The packed pages that the token behind so many sees in the window, where there is one."""
    if cache.windowed:
        table = cache.of_window(request)
        assert all(table[page] for page in OF_WINDOW.recent_pages(length))


@pytest.mark.parametrize("chunk", [64, 500, 2048, 4096])
def test_a_prompt_holds_sinks_and_recent_tokens_alone(cache: Cache, chunk: int) -> None:
    request = cache.request("one", ids(4096))
    cache.read(request, chunk)
    check_kept(cache, request)
    assert cache.write(request, 5)
    check_kept(cache, request)
    of_window = OF_WINDOW.most_pages(4097) if cache.windowed else 0
    assert cache.held(request) <= cache.kept.most_pages(4097) + of_window + -(-4097 // PACKED)


def test_a_row_that_is_written_holds_no_more_with_time(cache: Cache) -> None:
    request = cache.request("one", ids(300))
    cache.read(request, 300)
    for token in range(400):
        assert cache.write(request, token)
        check_kept(cache, request)
        _, raw = cache.tables(request)
        assert sum(map(bool, raw)) <= cache.kept.most_pages(request.num_computed_tokens)
        if cache.windowed:
            assert sum(map(bool, cache.of_window(request))) <= OF_WINDOW.most_pages(request.num_computed_tokens)


def test_a_chunk_has_all_pages_that_its_tokens_see() -> None:
    cache = Cache(windowed=True)
    request = cache.request("one", ids(3000))
    cache.begin(request, 1000)
    assert all(cache.of_window(request))
    assert cache.step(request, 1500)
    table = cache.of_window(request)
    first = OF_WINDOW.recent_pages(1000)[0]
    assert not any(table[:first]) and all(table[first : OF_WINDOW.pages(2500)])
    assert sum(map(bool, table)) <= OF_WINDOW.most_pages(2500) + OF_WINDOW.pages(1500)


def test_all_blocks_come_back(cache: Cache) -> None:
    free = cache.manager.block_pool.get_num_free_blocks()
    requests = [cache.request(str(number), ids(700, number % 2)) for number in range(4)]
    for request in requests:
        cache.read(request, 256)
    for request in requests:
        cache.manager.free(request)
    assert cache.manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize("chunk", [100, 418, 2048])
def test_the_same_prompt_is_found_as_far_as_pages_go(cache: Cache, chunk: int) -> None:
    first, second = cache.request("one", ids(700)), cache.request("two", ids(700))
    assert cache.read(first, chunk) == 0
    assert cache.read(second, chunk) == 699 // SHARED * SHARED
    check_kept(cache, second)
    shared = len(set(cache.tables(first)[0]) & set(cache.tables(second)[0]))
    assert shared == 699 // PACKED


def test_a_prompt_is_found_when_its_request_is_gone(cache: Cache) -> None:
    cache.read(first := cache.request("one", ids(700)), 2048)
    cache.manager.free(first)
    assert cache.read(cache.request("two", ids(700)), 2048) == 699 // SHARED * SHARED


def test_a_conversation_goes_on_from_where_it_was(cache: Cache) -> None:
    first = cache.request("one", ids(700))
    cache.read(first, 2048)
    for token in range(150):
        assert cache.write(first, token)
    cache.manager.free(first)
    second = cache.request("two", [*ids(700), *range(150), *ids(60, 3)])
    assert cache.read(second, 2048) == 850 // SHARED * SHARED


def test_what_prompts_have_in_common_is_found_from_the_third_on(cache: Cache) -> None:
    first, second, third = (
        cache.read(cache.request(str(number), [*ids(500), *ids(300, number)]), 2048) for number in (1, 2, 3)
    )
    # Sinks alone are found at once.
    assert (first, second, third) == (0, 64, 500 // SHARED * SHARED)


def test_other_tokens_are_not_found(cache: Cache) -> None:
    cache.read(cache.request("one", ids(700)), 2048)
    assert cache.read(cache.request("two", ids(700, 1)), 2048) == 0


def test_nothing_is_found_of_which_recent_tokens_are_gone() -> None:
    cache = Cache(blocks=90)
    first = cache.request("one", ids(700))
    cache.read(first, 2048)
    cache.manager.free(first)
    # Others take what is free, and with it what was recent in the first.
    cache.read(other := cache.request("two", ids(2000, 1)), 512)
    cache.manager.free(other)
    again = cache.request("three", ids(700))
    found = cache.read(again, 2048)
    assert found % SHARED == 0
    check_kept(cache, again)


def test_a_row_waits_where_there_is_no_page(cache: Cache) -> None:
    cache = Cache(blocks=45)
    request = cache.request("one", ids(400))
    cache.read(request, 100)
    grown = 0
    while cache.write(request, 7):
        grown += 1
    assert grown > 500
    assert cache.held(request) <= 44


@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    common=st.integers(0, 600),
    others=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    windowed=st.booleans(),
)
def test_every_row_has_what_it_reads(cuts: list[int], common: int, others: list[int], windowed: bool) -> None:
    cache = Cache(blocks=400, windowed=windowed)
    for number, rest in enumerate(others):
        request = cache.request(str(number), [*ids(common), *ids(rest, number + 1)])
        length = cache.begin(request, cuts[0])
        packed, raw = cache.tables(request)
        assert all(raw[page] for page in range(cache.kept.pages(length)) if cache.kept.is_kept(page, length))
        assert packed_blocks(length, cache.kept.sinks, cache.kept.recent) * 32 <= len(packed) * PACKED
        check_window(cache, request, length)
        for cut in [*cuts[1:], 10_000]:
            if left := request.num_tokens - request.num_computed_tokens:
                assert cache.step(request, min(cut, left))
                check_kept(cache, request)
        for token in range(number * 20):
            assert cache.write(request, token)
            check_kept(cache, request)
        if number % 2:
            cache.manager.free(request)
