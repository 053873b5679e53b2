"""Moves between two GPUs, of fake tensors."""

import torch
from torch import fx, ops
from torch._subclasses.fake_tensor import FakeTensorMode

from kvmix_compile.passes.graph.moves import OnDevices, align_indices, is_move, share_moves

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
FAKE = FakeTensorMode()


def given(
    graph: fx.Graph, name: str, *shape: int, device: torch.device = FIRST, dtype: torch.dtype = torch.float32
) -> fx.Node:
    node = graph.placeholder(name)
    with FAKE:
        node.meta["val"] = torch.empty(shape, device=device, dtype=dtype)
    return node


def called(graph: fx.Graph, operator: object, *args: object, **kwargs: object) -> fx.Node:
    """A node whose value is worked out as every other's is."""
    node = graph.call_function(operator, args, kwargs)
    values, options = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
    node.meta["val"] = operator(*values, **options)
    return node


def moved(graph: fx.Graph, node: fx.Node, device: torch.device) -> fx.Node:
    return called(graph, ops.aten.to.dtype_layout, node, dtype=torch.float32, device=device)


def moves_of(graph: fx.Graph) -> list[fx.Node]:
    graph.eliminate_dead_code()
    graph.lint()
    return [node for node in graph.nodes if is_move(node)]


def test_what_is_moved_for_two_layers_is_moved_once() -> None:
    graph = fx.Graph()
    table = given(graph, "table", 2)
    layers = [called(graph, ops.aten.neg.default, moved(graph, table, SECOND)) for _ in range(2)]
    graph.output(tuple(layers))
    share_moves(graph)
    (move,) = moves_of(graph)
    assert [layer.args[0] for layer in layers] == [move, move]


def test_what_is_moved_back_is_what_it_was() -> None:
    graph = fx.Graph()
    table = given(graph, "table", 2)
    layer = called(graph, ops.aten.neg.default, moved(graph, moved(graph, table, SECOND), FIRST))
    graph.output(layer)
    share_moves(graph)
    assert moves_of(graph) == []
    assert layer.args[0] is table


def test_what_is_written_to_is_moved_again() -> None:
    graph = fx.Graph()
    table = given(graph, "table", 2)
    first = moved(graph, table, SECOND)
    called(graph, ops.aten.add_.Tensor, table, 1)
    graph.output((first, moved(graph, table, SECOND)))
    share_moves(graph)
    assert len(moves_of(graph)) == 2


def test_another_dtype_is_no_move_alone() -> None:
    graph = fx.Graph()
    table = given(graph, "table", 2)
    halves = [called(graph, ops.aten.to.dtype_layout, table, dtype=torch.float16, device=SECOND) for _ in range(2)]
    graph.output(tuple(halves))
    share_moves(graph)
    assert moves_of(graph) == []
    assert len(graph.nodes) == 4


def test_an_index_is_moved_to_what_it_indexes() -> None:
    graph = fx.Graph()
    hidden, index = given(graph, "hidden", 3, 2), given(graph, "index", 1, device=SECOND, dtype=torch.int64)
    chosen = graph.call_function(ops.aten.index.Tensor, (hidden, [index]))
    graph.output(chosen)
    align_indices(graph)
    (move,) = moves_of(graph)
    assert move.args[0] is index
    assert chosen.args == (hidden, [move])


def test_an_input_is_moved_once_behind_all_inputs() -> None:
    graph = fx.Graph()
    lengths, other = graph.placeholder("lengths"), graph.placeholder("other")
    graph.output((lengths, other))
    on = OnDevices(lengths, FIRST)
    assert on.on(FIRST) is lengths
    assert on.on(SECOND) is on.on(SECOND)
    assert list(graph.nodes)[:3] == [lengths, other, on.on(SECOND)]
    assert on.on(SECOND).kwargs["device"] == SECOND
