"""Cleanup: what export leaves in a graph and a rewritten graph must not keep."""

from collections.abc import Callable, Sequence

from torch import Tensor, fx, ops
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kvmix_compile.passes.graph.vocabulary import graph_inputs, is_active_dropout, operation, tensor_of

# Checks that hold for the example's shapes; the rewritten graph sees others (a single token), and checks its own
# inputs.
_ASSERTIONS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)
_POSSIBLE_IDENTITIES = frozenset({"to", "slice", "dropout", "alias", "detach_", "lift_fresh_copy"})


def clean_up(module: fx.GraphModule) -> None:
    """Remove assertions, operations that do nothing, and dead code; then recompile. In place."""
    for node in list(module.graph.nodes):
        if operation(node) in _ASSERTIONS:
            module.graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def copy_of(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the graph, and what each of its nodes became in it."""
    copied, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.output(copied.graph_copy(graph, nodes))
    return copied, nodes


def add_inputs(graph: fx.Graph, names: Sequence[str]) -> list[fx.Node]:
    """New placeholders behind those that the graph has. In place."""
    added = []
    for name in names:
        with graph.inserting_after(graph_inputs(graph)[-1]):
            added.append(graph.placeholder(name))
    return added


def accept_any_strides(graph: fx.Graph) -> None:
    """Let views copy where they must. In place.

    A graph was traced with the strides that the model's own attention gives its output, and a `view` that is right for
    those need not be right for another operator's.
    """
    for node in graph.nodes:
        if node.target is ops.aten.view.default:
            node.target = ops.aten.reshape.default


def with_constant(
    module: fx.GraphModule,
    operator: Callable[..., Tensor],
    node: fx.Node,
    before: fx.Node,
    name: str,
    constant: Callable[[Tensor], Tensor],
) -> fx.Node:
    """A new node in front of `before`, of the shape of `node`: the operator of `node` and of a new constant.

    `constant` makes it for the value of `node`.
    """
    value = tensor_of(node)
    assert value is not None, node
    module.register_buffer(name, constant(value), persistent=False)
    with module.graph.inserting_before(before):
        found = module.graph.call_function(operator, (node, module.graph.get_attr(name)))
    found.meta = dict(node.meta)
    return found


def _is_identity(node: fx.Node) -> bool:
    if operation(node) not in _POSSIBLE_IDENTITIES or is_active_dropout(node):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device and _same_shape(before, after)


def _same_shape(first: Tensor, second: Tensor) -> bool:
    return first.dim() == second.dim() and all(
        statically_known_true(a == b) for a, b in zip(first.shape, second.shape, strict=True)
    )
