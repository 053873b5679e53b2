"""CUDA graphs: a step of decoding is recorded once and replayed, so that the host no longer launches each kernel."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmix_compile.passes.capture.export import first_line

Step = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Recorded:
    """A call as it was recorded: it reads `inputs`, writes to `outputs`, and `replay` does so again."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    replay: Callable[[], None]


def record(step: Step, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> Recorded:
    """A call of `step` recorded in a CUDA graph, which runs nothing yet."""
    own = [tensor.clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*own, *state)
    return Recorded(own, outputs, graph.replay)


class Replaying:
    """A step of decoding: a function of inputs, whose sizes stay, and of a cache's state, which it updates in place.

    It is recorded when a call follows another on the same state, at the same addresses: the first one runs as it is,
    and compiles the kernels, which cannot be done while recording. A state that grew, or whose rows changed places, is
    another one; where they do in every step, as in beam search, nothing is ever recorded.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self._last: tuple[object, ...] = ()
        self._recorded: Recorded | None = None
        self._can_record = True

    def __call__(self, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> Sequence[Tensor]:
        """What `step(*inputs, *state)` gives, in tensors of its own."""
        call = _identity(inputs, state)
        if call != self._last:
            # Where a recording's memory is needed for another one it must be free before.
            self._last, self._recorded = call, None
            return self.step(*inputs, *state)
        if self._recorded is None and self._can_record:
            self._recorded = self._record(inputs, state)
        if self._recorded is None:
            return self.step(*inputs, *state)
        for own, given in zip(self._recorded.inputs, inputs, strict=True):
            own.copy_(given)
        self._recorded.replay()
        return [output.clone() for output in self._recorded.outputs]

    def _record(self, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> Recorded | None:
        try:
            return record(self.step, inputs, state)
        except RuntimeError as error:
            self._can_record = False
            warnings.warn(
                f"steps of decoding run without a CUDA graph, as one cannot be recorded: {first_line(error)}",
                stacklevel=2,
            )
            return None


def _identity(inputs: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[object, ...]:
    """Equal for calls that one recording serves: it knows memory by its address, and nothing of whose it is."""
    return *(tuple(given.shape) for given in inputs), *((kept.data_ptr(), tuple(kept.shape)) for kept in state)
