"""A graph as data is the same graph again."""

import pickle

import pytest
from torch import fx, nn

from kvmix_compile.passes.graph.plain import as_graph, as_plain
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.rewrite.rewrite import rewrite
from tests.passes.rewrite.test_rewrite import KEY, VALUE, stored_alike


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "bloom", "fused_arange"])
def test_a_graph_comes_back_from_a_pickle(captured, name: str) -> None:
    graph = captured(name)
    sites = find_sites(graph).matched
    for module in (graph.module, rewrite(graph, sites, stored_alike(sites, KEY, VALUE)).module):
        again = as_graph(pickle.loads(pickle.dumps(as_plain(module.graph))))
        again.lint()
        assert str(again) == str(module.graph)
        assert again.python_code("self").src == module.graph.python_code("self").src


def test_arguments_in_each_other_come_back() -> None:
    graph = fx.Graph()
    first, second = graph.placeholder("first"), graph.placeholder("second")
    called = graph.call_module("part", ((first, None), [second, 1.5], slice(0, first)), {"named": {"one": second}})
    graph.output((called, [first]))
    again = as_graph(pickle.loads(pickle.dumps(as_plain(graph))))
    assert str(again) == str(graph)
    inputs = [node for node in again.nodes if node.op == "placeholder"]
    (call,) = (node for node in again.nodes if node.op == "call_module")
    assert call.all_input_nodes == inputs and call.kwargs["named"]["one"] is inputs[1]
    assert fx.GraphModule(nn.ModuleDict({"part": nn.Identity()}), again).code
