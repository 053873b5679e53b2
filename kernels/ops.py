"""The operators a compiled graph calls: torch.ops.kvmix.append, attend and order_channels.

A precision travels through a schema as the integers of Precision.as_ints. Devices without a kernel of their own run the
reference; one that has its own registers it under the device's dispatch key. Whatever autocast is on, a state keeps its
dtype: queries, keys and values are converted to it, and what is attended comes back in the dtype of the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.cpu import binding as cpu
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.gpu import dispatch
from kvmix_compile.kernels.weighting import Weighting

# Library.define, not custom_op: its wrappers cost more a call than the small kernels of a decode step.
_library = torch.library.Library("kvmix", "DEF")

_library.define(
    "append(Tensor k, Tensor v, Tensor lengths, Tensor starts, "
    "Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) packed_k, Tensor(d!) packed_v, Tensor(e!) tail_k, "
    "Tensor(f!) tail_v, int[] key, int[] value, int recent, int window=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor starts, "
    "Tensor sink_k, Tensor sink_v, Tensor packed_k, Tensor packed_v, Tensor tail_k, Tensor tail_v, "
    "int[] key, int[] value, int recent, float scale, float softcap, int sliding_window, "
    "int attention_chunk=0, Tensor? sink_logits=None, Tensor? slopes=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("order_channels(Tensor x, Tensor order) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@lru_cache
def _precision(*ints: int) -> Precision:
    return Precision.from_ints(ints)


@lru_cache
def _weighting(scale: float, softcap: float, sliding_window: int, attention_chunk: int = 0) -> Weighting:
    return Weighting(scale, softcap, sliding_window, attention_chunk)


def _append_operator(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel of append as an operator, to which precisions come as integers."""

    def operator(*arguments: Any) -> None:
        key, value, *numbers = arguments[10:]
        stored = (_stored_as(arguments[4], tensor) for tensor in arguments[:2])
        kernel(*stored, *arguments[2:10], _precision(*key), _precision(*value), *numbers)

    return _without_autocast(operator)


def _attend_operator(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel of attend as an operator, to which precisions come as integers and the weighting in pieces."""

    def operator(*arguments: Any) -> Tensor:
        key, value, recent, *numbers = arguments[11:18]
        weighting = _weighting(*numbers)
        if any(by_head is not None for by_head in arguments[18:]):
            weighting = replace(weighting, **dict(zip(("sink_logits", "slopes"), arguments[18:], strict=False)))
        stored = (_stored_as(arguments[5], tensor) for tensor in arguments[:3])
        attended = kernel(*stored, *arguments[3:11], _precision(*key), _precision(*value), recent, weighting)
        return _stored_as(arguments[0], attended)

    return _without_autocast(operator)


def _stored_as(other: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast is about what a model computes: what a kernel is made of computes in the dtypes that it asks for."""

    def called(*arguments: Any) -> Any:
        device = arguments[0].device.type
        if not torch.is_autocast_enabled(device):
            return operator(*arguments)
        with torch.autocast(device, enabled=False):
            return operator(*arguments)

    return called


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
for _key in _append_kernels:
    _library.impl("append", _append_operator(_append_kernels[_key]), _key)
    _library.impl("attend", _attend_operator(_attend_kernels[_key]), _key)
torch.library.register_fake("kvmix::append", _append_fake, lib=_library)
torch.library.register_fake("kvmix::attend", _attend_fake, lib=_library)
# Made of PyTorch's own operators, which a compiler behind this one may fuse.
_library.impl("order_channels", _order_channels, "CompositeImplicitAutograd")
