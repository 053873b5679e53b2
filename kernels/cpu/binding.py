"""attend and append on the CPU: the functions of cpu.cpp, called with the addresses of a state's tensors.

Arguments and results are the reference's. Whatever cpu.cpp does not do, the reference does: prompts on an empty state,
which PyTorch's own attention serves best; other dtypes and layouts; and all of it where there is no library.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu.call import appended, attended, is_prompt, shape_of, side_of, with_rows
from kvmix_compile.kernels.cpu.interface import ELEMENTS, Shape, Side
from kvmix_compile.kernels.cpu.library import library
from kvmix_compile.kernels.format.state import SiteState, required_blocks
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting


def append(chunk: Chunk, state: SiteState, storage: Storage) -> None:
    """As reference.append, byte for byte."""
    loaded = library()
    tokens, rows = chunk.key.shape[2], zip(chunk.lengths.tolist(), chunk.starts.tolist(), strict=True)
    ends = [length + tokens - start for length, start in rows]
    if loaded is None or not _served(chunk, state) or not _has_room(ends, state, storage):
        reference.append(chunk, state, storage)
        return
    chunk = with_rows(chunk)
    appended(loaded, chunk, _shape(chunk, state, storage), _sides(chunk, state), storage)


def attend(query: Tensor, chunk: Chunk, state: SiteState, storage: Storage, weighting: Weighting) -> Tensor:
    """As reference.attend, but for rounding. Its result depends neither on the number of threads nor on other rows."""
    loaded, lengths = library(), chunk.lengths.tolist()
    # Nothing is read beyond a state's end, whatever a row's length is said to be.
    served = _has_room(lengths, state, storage) and query.dtype == chunk.key.dtype and _served(chunk, state)
    if loaded is None or is_prompt(query, lengths) or not served:
        return reference.attend(query, chunk, state, storage, weighting)
    chunk = with_rows(chunk)
    sides, shape = _sides(chunk, state), _shape(chunk, state, storage)
    result = attended(loaded, query, chunk, shape, sides, storage, weighting)
    assert result is not None, "a state has no pages that could be missing"
    return result


def _served(chunk: Chunk, state: SiteState) -> bool:
    dtype = chunk.key.dtype
    return (
        dtype in ELEMENTS
        and chunk.value.dtype == state.sink_k.dtype == state.sink_v.dtype == dtype
        and state.recent_k.dtype == state.recent_v.dtype == dtype
        and all(map(Tensor.is_contiguous, (chunk.lengths, chunk.starts, *state.tensors())))
    )


def _has_room(lengths: Sequence[int], state: SiteState, storage: Storage) -> bool:
    """Whether the state has room for the blocks of rows of so many tokens."""
    return required_blocks(max(lengths, default=0), state.sinks, storage.recent, storage.window) <= state.blocks


def _shape(chunk: Chunk, state: SiteState, storage: Storage) -> Shape:
    return shape_of(chunk, state.sinks, state.blocks, state.recent_slots, storage.recent)


def _sides(chunk: Chunk, state: SiteState) -> tuple[Side, Side]:
    """The keys and the values."""
    return (
        side_of(chunk.key, state.sink_k, state.packed_k, state.recent_k),
        side_of(chunk.value, state.sink_v, state.packed_v, state.recent_v),
    )
