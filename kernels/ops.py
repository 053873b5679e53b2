"""The operators a compiled graph calls: torch.ops.kvmix.append, attend, attend_stepwise and order_channels; and those
that an engine calls whose memory is pages: append_paged, attend_paged and attend_stepwise_paged.

Here alone is known in which order they take what the records of a call hold; a precision travels through a schema as
the integers of Precision.as_ints. Devices without a kernel of their own run the reference; one that has its own
registers it under the device's dispatch key. Whatever autocast is on and whatever dtype queries, keys and values have,
a state keeps its own, and what is attended comes back in the dtype of the queries (mixed_dtypes.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvmix_compile.kernels import paged, reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.cpu import binding as cpu
from kvmix_compile.kernels.cpu import paged as cpu_paged
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.gpu import dispatch
from kvmix_compile.kernels.mixed_dtypes import Attend, attending_any_dtype
from kvmix_compile.kernels.stepwise import Append, stepwise
from kvmix_compile.kernels.weighting import Weighting

# Library.define, not custom_op: its wrappers cost more a call than the small kernels of a decode step.
_library = torch.library.Library("kvmix", "DEF")

# What all ways of attending are told besides, alike.
_ATTENTION = (
    "int[] key, int[] value, int recent, float scale, float softcap, int sliding_window, "
    "int attention_chunk=0, Tensor? sink_logits=None, Tensor? slopes=None) -> Tensor"
)

_library.define(
    "append(Tensor k, Tensor v, Tensor lengths, Tensor starts, "
    "Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) packed_k, Tensor(d!) packed_v, Tensor(e!) recent_k, "
    "Tensor(f!) recent_v, int[] key, int[] value, int recent, int window=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor starts, "
    "Tensor sink_k, Tensor sink_v, Tensor packed_k, Tensor packed_v, Tensor recent_k, Tensor recent_v, " + _ATTENTION,
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attend_stepwise(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor starts, "
    "Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) packed_k, Tensor(d!) packed_v, Tensor(e!) recent_k, "
    "Tensor(f!) recent_v, " + _ATTENTION,
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "append_paged(Tensor k, Tensor v, Tensor lengths, Tensor starts, Tensor raw, Tensor packed, "
    "Tensor(a!) raw_k, Tensor(b!) raw_v, Tensor(c!) packed_k, Tensor(d!) packed_v, int sinks, "
    "int[] key, int[] value, int recent) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attend_stepwise_paged(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor starts, Tensor raw, Tensor packed, "
    "Tensor(a!) raw_k, Tensor(b!) raw_v, Tensor(c!) packed_k, Tensor(d!) packed_v, int sinks, " + _ATTENTION,
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attend_paged(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor starts, Tensor raw, Tensor packed, "
    "Tensor raw_k, Tensor raw_v, Tensor packed_k, Tensor packed_v, int sinks, " + _ATTENTION,
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("order_channels(Tensor x, Tensor order) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def append_arguments(chunk: Chunk, state: SiteState | Pages, storage: Storage) -> tuple[Any, ...]:
    """What torch.ops.kvmix.append takes, or of pages append_paged, in its order. In a graph nodes stand in the records
    for tensors.
    """
    key, value = storage.key.as_ints(), storage.value.as_ints()
    if isinstance(state, Pages):
        return *chunk, *state, key, value, storage.recent
    return *chunk, *state.tensors(), key, value, storage.recent, storage.window


def attend_arguments(
    query: Tensor, chunk: Chunk, state: SiteState | Pages, storage: Storage, weighting: Weighting
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What torch.ops.kvmix.attend and attend_stepwise take, or of pages those of pages: in their order what every model
    needs, and by name what few do. In a graph nodes stand in the records for tensors.
    """
    key, value = storage.key.as_ints(), storage.value.as_ints()
    held = state if isinstance(state, Pages) else state.tensors()
    stored = (query, *chunk, *held, key, value, storage.recent)
    extras: dict[str, Any] = {}
    if weighting.attention_chunk:
        extras["attention_chunk"] = weighting.attention_chunk
    if weighting.sink_logits is not None:
        extras["sink_logits"] = weighting.sink_logits
    if weighting.slopes is not None:
        extras["slopes"] = weighting.slopes
    return (*stored, weighting.scale, weighting.softcap, weighting.sliding_window), extras


def _append_operator(kernel: Append) -> Callable[..., None]:
    """A kernel of append as an operator, which is called as its schema says."""

    def operator(
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        starts: Tensor,
        sink_k: Tensor,
        sink_v: Tensor,
        packed_k: Tensor,
        packed_v: Tensor,
        recent_k: Tensor,
        recent_v: Tensor,
        key: list[int],
        value: list[int],
        recent: int,
        window: int = 0,
    ) -> None:
        state = SiteState(
            sink_k=sink_k, sink_v=sink_v, packed_k=packed_k, packed_v=packed_v, recent_k=recent_k, recent_v=recent_v
        )
        chunk = Chunk(key=k, value=v, lengths=lengths, starts=starts)
        _without_autocast(k.device, kernel, chunk, state, _storage(tuple(key), tuple(value), recent, window))

    return operator


def _attend_operator(kernel: Attend) -> Callable[..., Tensor]:
    """A kernel of attend as an operator, which is called as its schema says."""

    def operator(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        starts: Tensor,
        sink_k: Tensor,
        sink_v: Tensor,
        packed_k: Tensor,
        packed_v: Tensor,
        recent_k: Tensor,
        recent_v: Tensor,
        key: list[int],
        value: list[int],
        recent: int,
        scale: float,
        softcap: float,
        sliding_window: int,
        attention_chunk: int = 0,
        sink_logits: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        weighting = _weighting(scale, softcap, sliding_window, attention_chunk, sink_logits, slopes)
        state = SiteState(
            sink_k=sink_k, sink_v=sink_v, packed_k=packed_k, packed_v=packed_v, recent_k=recent_k, recent_v=recent_v
        )
        chunk = Chunk(key=k, value=v, lengths=lengths, starts=starts)
        storage = _storage(tuple(key), tuple(value), recent, weighting.window)
        attended: Tensor = _without_autocast(q.device, kernel, q, chunk, state, storage, weighting)
        return attended

    return operator


def _append_paged_operator(kernel: Callable[[Chunk, Pages, Storage], None]) -> Callable[..., None]:
    """As _append_operator."""

    def operator(
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        starts: Tensor,
        raw: Tensor,
        packed: Tensor,
        raw_k: Tensor,
        raw_v: Tensor,
        packed_k: Tensor,
        packed_v: Tensor,
        sinks: int,
        key: list[int],
        value: list[int],
        recent: int,
    ) -> None:
        pages = Pages(raw, packed, raw_k, raw_v, packed_k, packed_v, sinks)
        chunk = Chunk(key=k, value=v, lengths=lengths, starts=starts)
        _without_autocast(k.device, kernel, chunk, pages, _storage(tuple(key), tuple(value), recent, window=0))

    return operator


def _attend_paged_operator(
    kernel: Callable[[Tensor, Chunk, Pages, Storage, Weighting], Tensor],
) -> Callable[..., Tensor]:
    """As _attend_operator."""

    def operator(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        starts: Tensor,
        raw: Tensor,
        packed: Tensor,
        raw_k: Tensor,
        raw_v: Tensor,
        packed_k: Tensor,
        packed_v: Tensor,
        sinks: int,
        key: list[int],
        value: list[int],
        recent: int,
        scale: float,
        softcap: float,
        sliding_window: int,
        attention_chunk: int = 0,
        sink_logits: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        weighting = _weighting(scale, softcap, sliding_window, attention_chunk, sink_logits, slopes)
        pages = Pages(raw, packed, raw_k, raw_v, packed_k, packed_v, sinks)
        chunk = Chunk(key=k, value=v, lengths=lengths, starts=starts)
        storage = _storage(tuple(key), tuple(value), recent, weighting.window)
        attended: Tensor = _without_autocast(q.device, kernel, q, chunk, pages, storage, weighting)
        return attended

    return operator


# Made for each site, not for each call: a decode step calls every site's operators for a single token.
@lru_cache(maxsize=1024)
def _storage(key: tuple[int, ...], value: tuple[int, ...], recent: int, window: int) -> Storage:
    return Storage(key=Precision.from_ints(key), value=Precision.from_ints(value), recent=recent, window=window)


@lru_cache
def _kept_weighting(scale: float, softcap: float, sliding_window: int, attention_chunk: int) -> Weighting:
    return Weighting(scale=scale, softcap=softcap, sliding_window=sliding_window, attention_chunk=attention_chunk)


def _weighting(
    scale: float,
    softcap: float,
    sliding_window: int,
    attention_chunk: int,
    sink_logits: Tensor | None,
    slopes: Tensor | None,
) -> Weighting:
    weighting = _kept_weighting(scale, softcap, sliding_window, attention_chunk)
    if sink_logits is None and slopes is None:
        return weighting
    return replace(weighting, sink_logits=sink_logits, slopes=slopes)


def _without_autocast(device: torch.device, kernel: Callable[..., Any], *records: Any) -> Any:
    """Autocast is about what a model computes: what a kernel is made of computes in the dtypes that it asks for."""
    if not torch.is_autocast_enabled(device.type):
        return kernel(*records)
    with torch.autocast(device.type, enabled=False):
        return kernel(*records)


def _order_channels(x: Tensor, order: Tensor) -> Tensor:
    """Each head's channels in an order of its own: queries and keys in the same one have the same products.

    x: [B, Hq, M, dim]; order: int64 [H, dim], one for each of H groups of neighbouring heads.
    Returns [B, Hq, M, dim], contiguous.
    """
    batch, heads, tokens, dim = x.shape
    shared = heads // order.shape[0]
    index = order[:, None, None].expand(-1, shared, tokens, -1).reshape(1, heads, tokens, dim)
    return x.gather(-1, index.expand(batch, -1, -1, -1))


def _append_fake(*arguments: Any) -> None:
    """Nothing to say: the state's shapes do not change."""


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *state_and_options: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


_append_kernels = {
    "CompositeExplicitAutograd": reference.append, "CPU": cpu.append, "CUDA": dispatch.append_on_cuda
}  # fmt: skip
_attend_kernels = {
    "CompositeExplicitAutograd": reference.attend, "CPU": cpu.attend, "CUDA": dispatch.attend_on_cuda
}  # fmt: skip
_paged_kernels = {
    "CompositeExplicitAutograd": (paged.append, paged.attend),
    "CPU": (cpu_paged.append, cpu_paged.attend),
    "CUDA": (dispatch.append_on_cuda, dispatch.attend_on_cuda),
}
for _key in _append_kernels:
    _append, _attend = _append_kernels[_key], attending_any_dtype(_attend_kernels[_key])
    _stepwise = stepwise(_attend, _append)
    _library.impl("append", _append_operator(_append), _key)
    _library.impl("attend", _attend_operator(_attend), _key)
    _library.impl("attend_stepwise", _attend_operator(_stepwise), _key)
    _append_paged, _attend_paged = _paged_kernels[_key][0], attending_any_dtype(_paged_kernels[_key][1])
    _stepwise_paged = paged.stepwise(_attend_paged, _append_paged, _stepwise)
    _library.impl("append_paged", _append_paged_operator(_append_paged), _key)
    _library.impl("attend_paged", _attend_paged_operator(_attend_paged), _key)
    _library.impl("attend_stepwise_paged", _attend_paged_operator(_stepwise_paged), _key)
for _name in ("append", "append_paged"):
    torch.library.register_fake(f"kvmix::{_name}", _append_fake, lib=_library)
for _name in ("attend", "attend_stepwise", "attend_paged", "attend_stepwise_paged"):
    torch.library.register_fake(f"kvmix::{_name}", _attend_fake, lib=_library)
# Made of PyTorch's own operators, which a compiler behind this one may fuse.
_library.impl("order_channels", _order_channels, "CompositeImplicitAutograd")
