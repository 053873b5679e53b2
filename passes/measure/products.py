"""Matrix products of 16-bit numbers on a CPU, computed in float32.

Few processors multiply bfloat16, and none multiplies float16 fast in every layout: `x @ w` of 512 rows and 2048 times
8192 weights takes 55 seconds in float16 where float32 takes 0.1, and half of a backward pass is such products. Besides,
what is measured is then the same on every processor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten
# What products are made of by the time that they are computed, in the forward pass and in the backward pass.
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default})
# Elements of the weights that there is a copy of at a time: those of a large vocabulary would take a gigabyte and more.
PART = 2**24


def products_in_float32(model: nn.Module) -> AbstractContextManager[Any]:
    """Around what is computed with a model: products of 16-bit tensors on a CPU are computed in float32 and rounded to
    their dtype. Copies in float32 last as long as a product: none is kept for the backward pass.
    """
    is_half = any(tensor.dtype in _HALF and tensor.device.type == "cpu" for tensor in model.parameters())
    return _ProductsInFloat32() if is_half else nullcontext()


class _ProductsInFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _PRODUCTS or args[0].dtype not in _HALF or args[0].device.type != "cpu":
            return function(*args, **kwargs)
        if function is _aten.mm.default and args[1].numel() > PART:
            return _in_parts(*args)
        args_in_float32, kwargs_in_float32 = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args_in_float32, **kwargs_in_float32).to(args[0].dtype)


def _in_parts(inputs: Tensor, weights: Tensor) -> Tensor:
    """`inputs @ weights`, of as many columns, or rows, of the weights at a time as PART allows."""
    rows, columns = weights.shape
    if columns >= rows:
        product = inputs.new_empty(len(inputs), columns)
        inputs, width = inputs.float(), max(1, PART // rows)
        for part, some in zip(product.split(width, dim=1), weights.split(width, dim=1), strict=True):
            part.copy_(inputs @ some.float())
        return product
    height = max(1, PART // columns)
    parts = zip(inputs.split(height, dim=1), weights.split(height), strict=True)
    total = torch.zeros(len(inputs), columns, device=inputs.device)
    for part, some in parts:
        total.addmm_(part.float(), some.float())
    return total.to(inputs.dtype)
