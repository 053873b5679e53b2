"""What only a GPU shows: no waiting for the host, CUDA graphs, and how much memory a step takes."""

import pytest
import torch
from torch import Tensor

import kvmix_compile.kernels.ops  # noqa: F401  (registers the operators)
from kvmix_compile.kernels import reference
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.kernels.weighting import Weighting
from tests.kernels.attend_cases import TOLERANCE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

LAYOUT = StateLayout(
    SiteShape(2, 64, 64), key=Precision(2, 32, 4, (4, 3)), value=Precision(2, 32, 4), sinks=4, recent=32
)
SHARED = 4
SCALE = 64**-0.5


class Step:
    """One token after the other for two rows, on the GPU: attend and append, and the count of tokens goes up."""

    def __init__(self, layout: StateLayout, tokens: int, capacity: int) -> None:
        self.layout = layout
        generator = torch.Generator().manual_seed(0)

        def chunk(heads: int, count: int) -> Tensor:
            return torch.randn(2, heads, count, layout.key_dim, generator=generator).to("cuda", torch.bfloat16)

        self.q = chunk(SHARED * layout.kv_heads, 1)
        self.k, self.v = chunk(layout.kv_heads, 1), chunk(layout.kv_heads, 1)
        self.lengths = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.starts = torch.zeros_like(self.lengths)
        self.state = SiteState.allocate(layout, 2, layout.required_blocks(capacity), torch.bfloat16, "cuda")
        self._append(chunk(layout.kv_heads, tokens), chunk(layout.kv_heads, tokens))
        self.lengths += tokens

    def run(self) -> Tensor:
        key, value = self.layout.key.as_ints(), self.layout.value.as_ints()
        inputs = (self.q, self.k, self.v, self.lengths, self.starts, *self.state.tensors())
        attended = torch.ops.kvmix.attend(*inputs, key, value, self.layout.recent, SCALE, 0.0, 0)
        self._append(self.k, self.v)
        self.lengths += 1
        return attended

    def expected(self) -> Tensor:
        """What the reference makes of the state as it is."""
        chunk = Chunk(key=self.k.cpu(), value=self.v.cpu(), lengths=self.lengths.cpu(), starts=self.starts.cpu())
        state = SiteState(*map(Tensor.cpu, self.state.tensors()))
        return reference.attend(self.q.cpu(), chunk, state, self.layout.storage, Weighting(SCALE))

    def _append(self, k: Tensor, v: Tensor) -> None:
        key, value = self.layout.key.as_ints(), self.layout.value.as_ints()
        torch.ops.kvmix.append(k, v, self.lengths, self.starts, *self.state.tensors(), key, value, self.layout.recent)


def test_a_step_never_waits_for_the_host() -> None:
    step = Step(LAYOUT, tokens=150, capacity=300)
    step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_goes_on_from_token_to_token() -> None:
    captured, eager = Step(LAYOUT, tokens=150, capacity=300), Step(LAYOUT, tokens=150, capacity=300)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.run()  # compiles the kernels, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    eager.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attended = captured.run()
    # Several blocks are completed on the way.
    for _ in range(80):
        expected = eager.expected()
        eager.run()
        graph.replay()
        tolerance = TOLERANCE[torch.bfloat16]
        torch.testing.assert_close(attended.cpu(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(captured.lengths, eager.lengths)
    for written, also_written in zip(captured.state.tensors(), eager.state.tensors(), strict=True):
        assert torch.equal(written.view(torch.uint8), also_written.view(torch.uint8))


def test_nothing_of_the_size_of_the_dequantized_cache_is_allocated() -> None:
    tokens = 32768
    step = Step(LAYOUT, tokens, capacity=tokens + 100)
    step.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    dequantized = 2 * step.k.nbytes * tokens
    assert torch.cuda.max_memory_allocated() - before < dequantized / 50
