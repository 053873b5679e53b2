"""Mixed dtypes: attend where queries, keys and values have another dtype than the state, which append keeps in its own.

What is attended is computed in a dtype that holds all of a query's and of the state's numbers, so that neither
overflows, and comes back in the query's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.pages import Pages
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.format.storage import Storage
from kvmix_compile.kernels.weighting import Weighting

Attend = Callable[[Tensor, Chunk, SiteState, Storage, Weighting], Tensor]
Held = TypeVar("Held", SiteState, Pages)


def attending_any_dtype(
    attend: Callable[[Tensor, Chunk, Held, Storage, Weighting], Tensor],
) -> Callable[[Tensor, Chunk, Held, Storage, Weighting], Tensor]:
    """A kernel of attend that takes any dtypes, from one that takes query and chunk in the same: that of the state, or
    one that holds its numbers, too, where no block consists of elements in the state's.
    """

    def kernel(query: Tensor, chunk: Chunk, state: Held, storage: Storage, weighting: Weighting) -> Tensor:
        dtype = torch.promote_types(query.dtype, state.dtype) if storage.is_quantized else state.dtype
        if query.dtype == dtype:
            return attend(query, chunk.in_dtype(dtype), state, storage, weighting)
        return attend(query.to(dtype), chunk.in_dtype(dtype), state, storage, weighting).to(query.dtype)

    return kernel
