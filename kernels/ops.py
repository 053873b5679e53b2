"""The operators a compiled graph calls: torch.ops.kvmix.append, attend and order_channels.

A precision travels through a schema as the integers [bits, group, scale_bits, important_bits]. Devices without a kernel
of their own run the reference; one that has its own registers it under the device's dispatch key.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvmix_compile.kernels import cpu, dispatch, reference
from kvmix_compile.kernels.precision import Precision

# Library.define, not custom_op: its wrappers cost more a call than the small kernels of a decode step.
_library = torch.library.Library("kvmix", "DEF")

_library.define(
    "append(Tensor k, Tensor v, Tensor lengths, Tensor starts, "
    "Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) packed_k, Tensor(d!) packed_v, Tensor(e!) tail_k, "
    "Tensor(f!) tail_v, int[] key, int[] value, int recent) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor starts, "
    "Tensor sink_k, Tensor sink_v, Tensor packed_k, Tensor packed_v, Tensor tail_k, Tensor tail_v, "
    "int[] key, int[] value, int recent, float scale, float softcap, int sliding_window) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("order_channels(Tensor x, Tensor order) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@lru_cache
def _precision(*ints: int) -> Precision:
    return Precision.from_ints(ints)


def _append(*arguments: Any) -> None:
    reference.append(*_with_precisions(arguments, key=10))


def _attend(*arguments: Any) -> Tensor:
    return reference.attend(*_with_precisions(arguments, key=11))


def _append_on_cpu(*arguments: Any) -> None:
    cpu.append(*_with_precisions(arguments, key=10))


def _attend_on_cpu(*arguments: Any) -> Tensor:
    return cpu.attend(*_with_precisions(arguments, key=11))


def _append_on_cuda(*arguments: Any) -> None:
    dispatch.append_on_cuda(*_with_precisions(arguments, key=10))


def _attend_on_cuda(*arguments: Any) -> Tensor:
    return dispatch.attend_on_cuda(*_with_precisions(arguments, key=11))


def _with_precisions(arguments: tuple[Any, ...], key: int) -> tuple[Any, ...]:
    """Integers become precisions: the keys' at this place, the values' at the next."""
    value = key + 1
    return *arguments[:key], _precision(*arguments[key]), _precision(*arguments[value]), *arguments[value + 1 :]


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


for _name, _kernel, _cpu_kernel, _cuda_kernel, _fake in (
    ("append", _append, _append_on_cpu, _append_on_cuda, _append_fake),
    ("attend", _attend, _attend_on_cpu, _attend_on_cuda, _attend_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _cpu_kernel, "CPU")
    _library.impl(_name, _cuda_kernel, "CUDA")
    torch.library.register_fake(f"kvmix::{_name}", _fake, lib=_library)
# Made of PyTorch's own operators, which a compiler behind this one may fuse.
_library.impl("order_channels", _order_channels, "CompositeImplicitAutograd")
