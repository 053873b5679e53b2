"""Carried: in a rewritten graph each stateful module is given its state of before, and the graph gives that of after.

The states come as inputs behind those of the sites, and go as outputs behind the logits. Nothing is written in place,
so that a step that fails leaves them as they were.
"""

from operator import getitem

from torch import fx

from kvmix_compile.passes.capture.single_nodes import CarriedState, SingleNode
from kvmix_compile.passes.graph.edit import add_inputs
from kvmix_compile.passes.graph.moves import OnDevices, device_of


def carry_states(module: fx.GraphModule, starts: OnDevices) -> tuple[CarriedState, ...]:
    """Give the graph inputs and outputs for the states of its single nodes; returns whose they are, in their order. In
    place.

    starts: the graph's input of how much padding leads each row, on the devices of the modules.
    """
    graph, carried, after = module.graph, list[CarriedState](), list[fx.Node]()
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(single := module.get_submodule(str(node.target)), SingleNode):
            continue
        stateful = single.stateful
        before = add_inputs(graph, [f"carried_{len(carried)}_{index}" for index in range(len(stateful.states))])
        node.args = (tuple(before), starts.on(device_of(node.args[2])), *node.args[2:])
        with graph.inserting_after(node):
            results = len(stateful.results)
            after += [graph.call_function(getitem, (node, results + index)) for index in range(len(before))]
        carried.append(stateful.carried)
    if carried:
        output = next(node for node in graph.nodes if node.op == "output")
        output.args = ((output.args[0], *after),)
    return tuple(carried)
