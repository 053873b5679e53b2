"""The small passes: cleanup, evaluate, limits, device."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.errors import CaptureError, UnsupportedModelError
from kvmix_compile.passes.graph.devices import move_constants
from kvmix_compile.passes.graph.edit import accept_any_strides, clean_up
from kvmix_compile.passes.graph.evaluate import evaluate
from kvmix_compile.passes.graph.vocabulary import operation
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.rewrite.rewrite import rewrite
from tests.helpers.stored import stored_alike


class Cluttered(nn.Module):
    """Operations that do nothing, some that look so, and a dropout that `training` turns on."""

    def __init__(self, training: bool = False) -> None:
        super().__init__()
        self.dropping = training

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)[:, :]
        y = F.dropout(y, 0.5, self.dropping)
        return y[:, :2].to(torch.float64)


def exported(module: nn.Module) -> fx.GraphModule:
    program = torch.export.export(module, (torch.randn(3, 4),))
    graph = program.graph
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (output.args[0][0],)
    return fx.GraphModule(nn.Module(), graph)


def calls(module: fx.GraphModule) -> list[str]:
    return [operation(node) for node in module.graph.nodes if node.op == "call_function"]


def test_cleaning_up_removes_what_does_nothing() -> None:
    module, x = exported(Cluttered()), torch.randn(3, 4)
    assert "dropout" in calls(module)
    clean_up(module)
    assert calls(module) == ["slice", "to"]
    assert torch.equal(module(x), x[:, :2].double())


def test_cleaning_up_keeps_active_dropout() -> None:
    module = exported(Cluttered(training=True))
    clean_up(module)
    assert "dropout" in calls(module)


def test_cleaning_up_removes_dead_code_and_checks() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.call_function(torch.ops.aten._assert_async.default, (x,))
    graph.output(graph.call_function(torch.ops.aten.cos.default, (x,)))
    module = fx.GraphModule(nn.Module(), graph)
    clean_up(module)
    assert calls(module) == ["cos"]


def test_views_are_made_to_accept_any_strides() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(12)

    module, other_strides = exported(Flat()), torch.randn(4, 3).T
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        module(other_strides)
    accept_any_strides(module.graph)
    module.recompile()
    assert torch.equal(module(other_strides), other_strides.reshape(12))


# Evaluate


def chain() -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    double = graph.call_function(torch.mul, (x, 2))
    both = graph.call_function(torch.add, (double, y))
    fails = graph.call_function(torch.mm, (both, both))
    graph.output(fails)
    return fx.GraphModule(nn.Module(), graph), {node.name: node for node in graph.nodes}


def test_only_what_is_needed_is_run() -> None:
    module, nodes = chain()
    assert evaluate(module, nodes["mul"], {nodes["x"]: torch.tensor(3)}) == 6
    # What is known is not computed again, nor what lies behind it.
    assert evaluate(module, nodes["add"], {nodes["mul"]: torch.tensor(10), nodes["y"]: torch.tensor(1)}) == 11
    assert evaluate(module, nodes["mul"], {nodes["mul"]: 5}) == 5


def test_an_input_that_is_needed_and_unknown_is_named() -> None:
    module, nodes = chain()
    with pytest.raises(KeyError, match="y"):
        evaluate(module, nodes["add"], {nodes["x"]: torch.tensor(3)})


def test_what_is_known_is_left_alone() -> None:
    module, nodes = chain()
    known = {nodes["x"]: torch.tensor(3)}
    evaluate(module, nodes["mul"], known)
    assert list(known) == [nodes["x"]]


def test_an_operation_that_does_not_take_the_probe_is_a_refusal() -> None:
    module, nodes = chain()
    with pytest.raises(UnsupportedModelError, match="cannot be tried on a probe .add: The size of tensor a"):
        evaluate(module, nodes["add"], {nodes["mul"]: torch.ones(3), nodes["y"]: torch.ones(2)})


# Limits


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon"])
def test_limits_of_transformers_models(captured, name: str) -> None:
    assert captured(name).vocabulary == 128
    assert captured(name).longest_context == 512


def test_limits_of_plain_models(captured) -> None:
    assert captured("fused_arange").vocabulary == captured("hand_written").vocabulary == 128
    assert captured("fused_arange").longest_context == 512
    assert captured("hand_written").longest_context is None
    small = capture(plain.fused_arange(vocabulary=40, max_positions=77))
    assert (small.vocabulary, small.longest_context) == (40, 77)


def test_a_table_whose_end_is_read_limits_positions() -> None:
    """MPT's biases, of which its configuration says nothing by that name."""
    model = tiny("mpt")
    del model.config.max_position_embeddings
    captured = capture(model)
    assert captured.longest_context == model.config.max_seq_len
    assert not find_sites(captured).refused


def test_a_vocabulary_smaller_than_the_logits_counts() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.model.embed_tokens = nn.Embedding(100, 128)
    assert capture(model).vocabulary == 100


class SegmentTypes(nn.Module):
    """Adds the embedding of segment 0 to every token, as BERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.segments = nn.Embedding(64, 16), nn.Embedding(2, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids) + self.segments(torch.zeros(input_ids.shape, dtype=torch.int64))


def test_a_table_looked_up_at_a_constant_limits_nothing() -> None:
    captured = capture(SegmentTypes().eval())
    assert (captured.vocabulary, captured.longest_context) == (64, None)


class OtherPath(nn.Module):
    """Does something else with long texts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        return hidden if input_ids.shape[1] < 100 else 2 * hidden


def test_a_limit_that_no_table_explains_is_another_path() -> None:
    with pytest.raises(CaptureError, match="another path for a sequence beyond 99"):
        find_sites(capture(OtherPath().eval()))


# Device


def devices_in(module: fx.GraphModule) -> set[torch.device]:
    """The devices among the arguments of the graph's calls."""
    found: set[torch.device] = set()

    def note(value: object) -> None:
        if isinstance(value, torch.device):
            found.add(value)

    for node in module.graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), note)
    return found


def test_constants_follow_the_model() -> None:
    model = plain.hand_written()
    captured = capture(model)
    sites = find_sites(captured).matched
    module = rewrite(captured, sites, stored_alike(sites)).module
    meta = torch.device("meta")
    assert torch.device("cpu") in devices_in(captured.module)
    for graph_module in (captured.module, module):
        move_constants(graph_module, meta)
        assert devices_in(graph_module) <= {meta}
        assert all(buffer.device == meta for _, buffer in graph_module.named_buffers(recurse=False))
    model.to(meta)
    ids = torch.zeros(2, 5, dtype=torch.int64, device=meta)
    logits = captured.module(ids, ids, torch.arange(5, device=meta))
    assert logits.device == meta and logits.shape == (2, 5, 128)
