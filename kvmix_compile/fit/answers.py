"""Answers: what the caches of a model take of a device, and what fits into its memory."""

from dataclasses import dataclass
from typing import Self

import torch

from kvmix_compile.config import DEFAULT_BUDGET
from kvmix_compile.fit.caches import CacheKind, compressed, longest_context, plan_on_paper, unquantized
from kvmix_compile.fit.devices import Share
from kvmix_compile.fit.sketch import Sketch

# The default, and others to compare it with.
BUDGETS = (DEFAULT_BUDGET, 3.0, 4.0, 8.0)
# An element of float8, of which there are no scales.
FP8_BYTES = 1


@dataclass(frozen=True)
class Question:
    """What is to fit: so many rows of so many tokens on each of the devices, into so many bytes of each, if told."""

    context: int
    batch: int
    devices: int
    memory: int | None


@dataclass(frozen=True)
class Answer:
    """What a cache of one kind takes of a device. largest_batch, longest_context: of the largest that fit beside the
    weights; None where no memory is told, and where any context fits.
    """

    name: str
    stored_bits: float
    nbytes: int
    largest_batch: int | None
    longest_context: int | None

    @classmethod
    def of(cls, kind: CacheKind, question: Question, weight_bytes: int) -> Self:
        """For a device with so many bytes of weights."""
        nbytes, batch, context = question.batch * kind.row_bytes(question.context), None, None
        if question.memory is not None:
            room = max(0, question.memory - weight_bytes)
            batch = room // kind.row_bytes(question.context)
            context = longest_context(kind, room, question.batch)
        return cls(kind.name, kind.stored_bits, nbytes, batch, context)


def answers_to(question: Question, of_device: Share) -> list[Answer]:
    """Of the model's own cache, of one in float8, and of a compressed one at each of BUDGETS, in this order.

    Raises BudgetError where one of these cannot be met.
    """
    kinds = _kinds(of_device.cached, question.context)
    return [Answer.of(kind, question, of_device.weight_bytes) for kind in kinds]


def _kinds(cached: Sketch, context: int) -> list[CacheKind]:
    widest = max((site.dtype for site in cached.sites), key=lambda dtype: dtype.itemsize)
    return [
        unquantized(dtype_name(widest), cached),
        unquantized("fp8", cached, FP8_BYTES),
        *(compressed(f"budget={budget:g}", cached, plan_on_paper(cached, budget, context)) for budget in BUDGETS),
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: bfloat16."""
    return str(dtype).removeprefix("torch.")
