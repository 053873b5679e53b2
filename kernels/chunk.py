"""The new tokens of a call: what attend and append are given beside the state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvmix_compile.kernels.saturated import saturated


# Made at every call: a frozen dataclass takes twice as long to make.
class Chunk(NamedTuple):
    """M new tokens of B rows, for H heads of keys and values.

    key [B, H, M, key_dim], value [B, H, M, value_dim]: any strides.
    lengths int64 [B]: tokens each row holds already.
    starts int64 [B]: the padding tokens a row's chunk begins with, 0 to M; token j >= start is the row's token number
        length + j - start.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor
    starts: Tensor

    def values_are_keys(self, query: Tensor) -> bool:
        """Whether a query of value_dim + key_dim channels scores values too: a token's whole key is its value then,
        and what is stored as its key behind it.
        """
        return query.shape[-1] != self.key.shape[-1]

    def in_dtype(self, dtype: torch.dtype) -> Chunk:
        """With keys and values of this dtype. Magnitudes that it cannot hold become the largest that it can."""
        if self.key.dtype == self.value.dtype == dtype:
            return self
        return self._replace(key=saturated(self.key, dtype), value=saturated(self.value, dtype))
