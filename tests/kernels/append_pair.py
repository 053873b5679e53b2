"""A state that a kernel of append writes beside one that the reference writes."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.state import Room, SiteState, StateLayout


class Pair:
    """The reference's state is on the CPU, the kernel's on `device`; rows may have up to `most_tokens`.

    grows: the kernel's has no more room than its rows need, beside `least_slots` in the recent window.
    """

    def __init__(
        self,
        kernel: Callable[..., None],
        layout: StateLayout,
        batch: int,
        dtype: torch.dtype,
        device: str = "cpu",
        most_tokens: int = 420,
        grows: bool = False,
        least_slots: int = 0,
    ) -> None:
        self.kernel, self.layout, self.device, self.grows = kernel, layout, device, grows
        whole = layout.whole(layout.required_blocks(most_tokens))
        self.expected = SiteState.with_room(layout, batch, whole, dtype)
        room = Room(0, 0, least_slots) if grows else whole
        self.written = SiteState.with_room(layout, batch, room, dtype, device)
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def append(self, k: Tensor, v: Tensor, starts: Tensor) -> None:
        chunk, storage = Chunk(key=k, value=v, lengths=self.lengths, starts=starts), self.layout.storage
        reference.append(chunk, self.expected, storage)
        if self.grows:
            self.written.grow(self.layout.room(max((self.lengths + k.shape[2] - starts).tolist())))
        self.kernel(Chunk(*(tensor.to(self.device) for tensor in chunk)), self.written, storage)
        self.lengths = self.lengths + k.shape[2] - starts

    def check(self) -> None:
        self.written.grow(self.expected.room)
        for name, expected in vars(self.expected).items():
            written = getattr(self.written, name).cpu()[:, :, : expected.shape[2]]
            assert torch.equal(written.contiguous().view(torch.uint8), expected.view(torch.uint8)), name
