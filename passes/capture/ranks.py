"""Ranks: the processes over which the weights of a model are spread, and what they tell each other.

Whatever is called here must be called by all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from kvmix_compile.kernels.errors import KVMixError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """number: of this process among them, from 0. count: how many there are. mesh: what they are to PyTorch; None: this
    process is alone.
    """

    number: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, model: object) -> Ranks:
        """Those of the first of a model's parameters that is spread; this process alone for what is no model."""
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        spread = next((parameter for parameter in parameters if isinstance(parameter, DTensor)), None)
        if spread is None:
            return cls()
        mesh = spread.device_mesh
        return cls(mesh.get_local_rank() if mesh.ndim == 1 else 0, mesh.size(), mesh)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same: a copy of a cache or graph is of the same processes."""
        return self

    def part_of(self, size: int) -> slice:
        """This process's part of so many elements, which are spread evenly."""
        share = size // self.count
        return slice(self.number * share, (self.number + 1) * share)

    def sum(self, tensor: Tensor) -> Tensor:
        """Of the tensors that the processes have. It can be captured, and is differentiated: as if the loss were the
        sum of those that the processes have.
        """
        if self.mesh is None:
            return tensor
        summed = collectives.all_reduce(tensor, "sum", self.mesh)
        # Where it is not captured, it has only been begun.
        return summed.trigger_wait() if isinstance(summed, collectives.AsyncCollectiveTensor) else summed

    def joined(self, tensor: Tensor) -> Tensor:
        """What the processes have, in the order of their numbers, along the first dimension."""
        if self.mesh is None:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts)

    def told(self, value: T) -> list[T]:
        """What each process has: anything that can be pickled."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.mesh.get_group())
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around a stage of work: where it is refused in any process, each raises the error of the first that does."""
        refused = None
        try:
            yield
        except KVMixError as error:
            refused = error
        first = next((error for error in self.told(refused) if error is not None), None)
        if first is not None:
            raise refused if refused is not None and str(refused) == str(first) else first
