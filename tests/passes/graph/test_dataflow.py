"""Dataflow: who feeds whom, and what depends on the tokens themselves."""

import pytest
import torch
from torch import Tensor, nn

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.vocabulary import operation


class Counting(nn.Module):
    """Logits of tokens, positions and numbers of the tokens' shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.positions = nn.Embedding(64, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        ones = torch.ones_like(input_ids)
        counted = self.positions(torch.arange(input_ids.shape[1], device=input_ids.device) * 2)
        return torch.sin(self.embedding(input_ids)) + counted + torch.cos(ones)[..., None]


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(Counting().eval())


def names(nodes) -> set[str]:
    return {operation(node) for node in nodes}


def test_only_what_depends_on_token_values_depends_on_tokens(captured: Captured) -> None:
    dependent = Dataflow(captured.graph).token_dependent
    assert names(dependent) == {"placeholder", "embedding", "sin", "add", "index", "output"} - missing(captured)
    independent = set(captured.graph.nodes) - dependent
    assert {"arange", "ones_like", "cos", "mul", "embedding"} <= names(independent)


def missing(captured: Captured) -> set[str]:
    """The selection of logits may have been moved, but is there."""
    return {"index"} - names(captured.graph.nodes)


def test_ancestors_and_descendants(captured: Captured) -> None:
    dataflow = Dataflow(captured.graph)
    (sine,) = (node for node in captured.graph.nodes if operation(node) == "sin")
    (cosine,) = (node for node in captured.graph.nodes if operation(node) == "cos")
    assert captured.placeholder("input_ids") in dataflow.ancestors(sine)
    assert cosine not in dataflow.ancestors(sine)
    assert "output" in names(dataflow.descendants(cosine))
    assert sine not in dataflow.descendants(cosine)


def test_a_view_is_of_the_graph_as_it_was(captured: Captured) -> None:
    dataflow = Dataflow(captured.graph)
    assert set(dataflow.edges) == set(captured.graph.nodes)
