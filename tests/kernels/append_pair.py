"""A state that a kernel of append writes beside one that the reference writes."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.state import SiteState, StateLayout


class Pair:
    """The reference's state is on the CPU, the kernel's on `device`; rows may have up to `most_tokens`."""

    def __init__(
        self,
        kernel: Callable[..., None],
        layout: StateLayout,
        batch: int,
        dtype: torch.dtype,
        device: str = "cpu",
        most_tokens: int = 420,
    ) -> None:
        self.kernel, self.layout, self.device = kernel, layout, device
        blocks = layout.required_blocks(most_tokens)
        self.expected = SiteState.allocate(layout, batch, blocks, dtype)
        self.written = SiteState.allocate(layout, batch, blocks, dtype, device)
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def append(self, k: Tensor, v: Tensor, starts: Tensor) -> None:
        chunk, storage = Chunk(key=k, value=v, lengths=self.lengths, starts=starts), self.layout.storage
        reference.append(chunk, self.expected, storage)
        self.kernel(Chunk(*(tensor.to(self.device) for tensor in chunk)), self.written, storage)
        self.lengths = self.lengths + k.shape[2] - starts

    def check(self) -> None:
        for name, expected in vars(self.expected).items():
            written = getattr(self.written, name).cpu()
            assert torch.equal(written.view(torch.uint8), expected.view(torch.uint8)), name
