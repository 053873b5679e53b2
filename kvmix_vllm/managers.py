"""Which pages a request holds, in vLLM's scheduler.

Packed pages are those of all tokens: vLLM's own manager of full attention serves them. Where layers see a window, a row
holds what its last chunk packed and what its window saw before that. Unquantized tokens are another matter: sinks stay,
recent tokens move on, and what a prompt's chunk packs at once never needs a page of them.

    pages of a row of 4096 tokens     [ sinks ][ sinks ][ - ][ - ] ..  [ - ][ recent ][ recent ][ recent ][ recent ]

So that a later request can begin where this one's text is equal to its own, the recent tokens of a row must be there as
they were at that place. While a row grows a token at a time they pass by. Of a chunk, they are kept at the last place
where a page of packed blocks ends, and where another request's text was seen to part, if there are pages to spare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from kvmix_vllm.specs import KeptSpec, PackedSpec, PackedWindowSpec, RawSpec

# Of all blocks, the part that must be free before recent tokens are kept for requests that may never come.
SPARE_PART = 8


class RawManager(SingleTypeKVCacheManager):
    """The pages of unquantized tokens, each at its place in a row's table; the null block where there is none."""

    def __init__(self, kv_cache_spec: KeptSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.kept = kv_cache_spec.kept
        # The first page, behind the sinks, that has not been freed yet.
        self._first_held: dict[str, int] = {}
        # What the last step added: the place of the first of these, and the list that vLLM will hand to the worker.
        self._added: dict[str, tuple[int, list[KVCacheBlock]]] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that allocate_new_blocks will take from the pool, and those that a hit takes back from it."""
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        return sum(self._added_pages(held, num_tokens)) + self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Pages for a row that will have so many tokens: for those that it keeps, and null blocks for the others."""
        blocks = self.req_to_blocks[request_id]
        needed = self._added_pages(len(blocks), num_tokens)
        taken = iter(self._take(sum(needed)))
        added = [next(taken) if is_needed else self._null_block for is_needed in needed]
        self._added[request_id] = (len(blocks), added)
        blocks.extend(added)
        return added

    def _added_pages(self, held: int, num_tokens: int) -> list[bool]:
        """For each page of a row of so many tokens behind the `held` first ones, whether a block is taken for it."""
        return [self.kept.is_kept(page, num_tokens) for page in range(held, self.kept.pages(num_tokens))]

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Makes what the row holds known to later requests. Called at the end of a step's allocation, and alone told
        which request it is: here are pages added for what only these would need.
        """
        ends = (num_tokens, request.shared_prefix_boundary, *replay_boundaries)
        self._keep_at(request.request_id, {end // self.scheduler_block_size for end in ends}, num_tokens)
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def _keep_at(self, request_id: str, ends: Iterable[int], num_tokens: int) -> None:
        """Pages of what is recent at each of these lengths, in blocks of the scheduler, as far as they were left out of
        what the last step added.
        """
        first, added = self._added.pop(request_id, (0, []))
        blocks = self.req_to_blocks[request_id]
        for end in sorted(ends, reverse=True):
            length = end * self.scheduler_block_size
            missing = [page for page in self.kept.recent_pages(length) if page < len(blocks) and blocks[page].is_null]
            # What lay in front of the step's tokens is lost.
            if not missing or missing[0] < first or length > num_tokens:
                continue
            spare = self.block_pool.get_num_free_blocks() - self.block_pool.num_gpu_blocks // SPARE_PART
            if len(missing) > spare:
                return
            for page, block in zip(missing, self._take(len(missing)), strict=True):
                blocks[page] = added[page - first] = block

    def _take(self, count: int) -> list[KVCacheBlock]:
        return self.block_pool.get_new_blocks(count) if count else []

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Frees the pages of which no token is needed any more in a row that has so many."""
        blocks = self.req_to_blocks.get(request_id, [])
        first = self._first_held.get(request_id, self.kept.pages(self.kept.sinks))
        last = min(self.kept.first_recent(processed_computed_tokens) // self.kept.page, len(blocks))
        # The later a page, the longer it is of use to others: it is to be reused last.
        freed = [blocks[page] for page in range(first, last) if not blocks[page].is_null]
        blocks[first:last] = [self._null_block] * max(0, last - first)
        self._first_held[request_id] = max(first, last)
        self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As of vLLM's managers."""
        self._first_held.pop(request_id, None)
        self._added.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The pages of the longest row, a multiple of `alignment_tokens`, all of whose sinks and recent tokens are
        there.
        """
        kept = cast(KeptSpec, kv_cache_spec).kept
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kept.page,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )
        found: dict[int, list[KVCacheBlock] | None] = {}

        def cached(page: int) -> list[KVCacheBlock] | None:
            if page not in found:
                found[page] = block_pool.get_cached_block(hashes[page], kv_cache_group_ids)
            return found[page]

        for length in range(max_length // alignment_tokens * alignment_tokens, 0, -alignment_tokens):
            needed = {*kept.sink_pages(length), *kept.recent_pages(length)}
            # The last page first: where that is missing, the others need not be looked for.
            if all(cached(page) for page in sorted(needed, reverse=True)):
                rows: tuple[list[KVCacheBlock], ...] = tuple(
                    [block_pool.null_block] * kept.pages(length) for _ in kv_cache_group_ids
                )
                for page in needed:
                    for row, block in zip(rows, cached(page) or (), strict=True):
                        row[page] = block
                return rows, length
        return tuple([] for _ in kv_cache_group_ids), 0

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        use_eagle: bool,
        retention_interval: int | None = None,
        reachable_boundaries: Sequence[int] = (),
        dcp_world_size: int = 1,
        final_segment_end_block: int | None = None,
    ) -> list[bool] | None:
        """Whether each page is of use to a row that begins with this text, whose length `alignment_tokens` divides."""
        if alignment_tokens is None:
            return None
        kept = cast(KeptSpec, kv_cache_spec).kept

        def row(page: int) -> int:
            # The shortest that such a page may lie in.
            return -(-(page + 1) * kept.page // alignment_tokens) * alignment_tokens

        return [kept.is_kept(page, row(page)) for page in range(start_block, end_block)]


class PackedWindowManager(RawManager):
    """The packed pages of layers that see a window. A chunk's tokens may see whatever it packs, each in its window."""

    def _added_pages(self, held: int, num_tokens: int) -> list[bool]:
        return [True] * (self.kept.pages(num_tokens) - held)


def register_managers(config: VllmConfig) -> None:
    """Tells vLLM who manages what. Its own specs first: it adds none of them where it finds any."""
    register_all_kvcache_specs(config)
    KVCacheSpecRegistry.register(PackedSpec, FullAttentionManager, uniform_type_base_spec=FullAttentionSpec)
    KVCacheSpecRegistry.register(PackedWindowSpec, PackedWindowManager, uniform_type_base_spec=PackedWindowSpec)
    KVCacheSpecRegistry.register(RawSpec, RawManager, uniform_type_base_spec=RawSpec)
