"""Capture: what the graph takes, that it computes what the model computes, and what cannot be captured."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture, logits_of
from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.vocabulary import graph_inputs, operation

NAMES = ("llama", "gpt2", "mixtral", "hand_written", "fused_arange")


def run(captured: Captured, ids: Tensor, positions: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
    every = torch.arange(ids.shape[1])
    given = (ids, every.expand_as(ids) if positions is None else positions, every if wanted is None else wanted)
    with torch.no_grad():
        return captured.module(*given)


def original(captured: Captured, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(captured.model(ids))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (5, 64)])
def test_one_graph_serves_every_batch_and_length(captured, name: str, shape: tuple[int, int]) -> None:
    graph, ids = captured(name), torch.randint(3, 60, shape)
    torch.testing.assert_close(run(graph, ids), original(graph, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_logits_asked_for_are_computed(captured, name: str) -> None:
    graph, ids, wanted = captured(name), torch.randint(3, 60, (2, 9)), torch.tensor([8, 2])
    few = run(graph, ids, wanted=wanted)
    torch.testing.assert_close(few, original(graph, ids)[:, wanted], atol=1e-4, rtol=1e-4)
    (last,) = next(node for node in graph.graph.nodes if node.op == "output").all_input_nodes
    assert operation(last) == "linear", "logits are selected after all were computed"


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_read_from_the_live_model(captured, name: str) -> None:
    graph = captured(name)
    assert [node.name for node in graph_inputs(graph.graph)] == ["input_ids", "position_ids", "logit_positions"]
    own = {id(tensor) for tensor in (*graph.model.parameters(), *graph.model.buffers())}
    read = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
    weights = [target for target in read if target.startswith("model.")]
    assert len(weights) > 5
    assert all(id(attribute(graph.module, target)) in own for target in weights)
    assert not list(graph.module.parameters(recurse=False))


def attribute(module: nn.Module, target: str) -> object:
    for name in target.split("."):
        module = getattr(module, name)
    return module


def test_a_changed_weight_changes_the_graph() -> None:
    model = plain.fused_arange()
    graph, ids = capture(model), torch.randint(3, 60, (1, 9))
    with torch.no_grad():
        model.layers[0].attention.qkv.weight.mul_(0.5)
    torch.testing.assert_close(run(graph, ids), original(graph, ids), atol=1e-4, rtol=1e-4)


def test_positions_are_an_input_where_the_model_takes_them(captured) -> None:
    graph, ids = captured("gpt2"), torch.randint(3, 60, (2, 9))
    later = 5 + torch.arange(9).expand_as(ids)
    assert graph.has_position_input and not captured("fused_arange").has_position_input
    with torch.no_grad():
        expected = graph.model(ids, position_ids=later).logits
    torch.testing.assert_close(run(graph, ids, later), expected, atol=1e-4, rtol=1e-4)


def test_capturing_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    before, forward = {name: id(tensor) for name, tensor in model.named_parameters()}, model.forward
    capture(model)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert model.forward == forward and not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_logits_are_found_in_what_models_return() -> None:
    logits = torch.zeros(1, 2, 3)
    for output in (logits, (logits, "more"), [logits], SimpleNamespace(logits=logits)):
        assert logits_of(output) is logits
    for output in ("text", (), {"hidden": logits}, SimpleNamespace(logits=None)):
        with pytest.raises(CaptureError, match="forward returns logits"):
            logits_of(output)


class Embedder(nn.Module):
    def __init__(self, change: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.change = change

    def forward(self, input_ids: Tensor) -> object:
        return self.change(self.embedding(input_ids), input_ids)


def only_eleven(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden + torch.arange(11)[:, None]


def only_three_rows(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden + torch.arange(3)[:, None, None]


def by_content(hidden: Tensor, ids: Tensor) -> Tensor:
    return hidden if ids.sum() > 5 else 2 * hidden


@pytest.mark.parametrize("change", [only_eleven, only_three_rows, by_content])
def test_a_graph_that_does_not_serve_every_input_is_refused(change: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(CaptureError):
        capture(Embedder(change).eval())


def test_no_logits_are_an_error() -> None:
    with pytest.raises(CaptureError, match="there are no logits"):
        capture(Embedder(lambda hidden, ids: {"hidden": hidden}).eval())


def test_a_model_in_training_is_told_to_stop() -> None:
    with pytest.raises(CaptureError, match=r"model\.eval\(\)"):
        capture(plain.fused_arange().train())


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(CaptureError, match="encoder-decoder"):
        capture(tiny("t5"))


def test_a_model_without_token_ids_is_refused() -> None:
    with pytest.raises(CaptureError, match="input_ids"):
        capture(nn.Linear(4, 4).eval())
