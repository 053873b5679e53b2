"""What the tests of the passes share: models captured once, and a decoder whose attention a test writes itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture
from tests.helpers.one_capture import captured_once, zoo

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

VOCABULARY = 64


class Toy(nn.Module):
    """One layer: projections, `attend(query, key, value)` as the test says, and logits.

    query is `[batch, heads, tokens, head_dim]`, key and value have `kv_heads`.
    """

    def __init__(self, attend: Attend, heads: int = 4, kv_heads: int = 4, head_dim: int = 8) -> None:
        super().__init__()
        self.attend, self.head_dim = attend, head_dim
        width = heads * head_dim
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, kv_heads * head_dim)
        self.value = nn.Linear(width, kv_heads * head_dim)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return self.head(self.attend(query, key, value).transpose(1, 2).flatten(2))


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Captured]:
    """A model of the zoo as a graph, by name. Shared: tests leave it as they found it."""
    return lambda name: captured_once(zoo(name))


@pytest.fixture(scope="session")
def capture_toy() -> Callable[..., Captured]:
    """A Toy with the given attention as a graph."""

    def build(attend: Attend, **sizes: int) -> Captured:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return capture(Toy(attend, **sizes).eval())

    return build
