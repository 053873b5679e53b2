"""Vocabulary: one name for each operation, whichever spelling a graph uses.

Export writes ATen overloads (`aten.add.Tensor`), Dynamo writes functions, operators and methods (`torch.add`,
`operator.add`, `.add`). Matchers speak of `operation(node) == "add"` and never of targets.
"""

from collections.abc import Iterator, Set

from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket

_SYNONYMS = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "iadd": "add",
    "add_": "add",
    "mul_": "mul",
    "div_": "div",
    "_softmax": "softmax",
    "safe_softmax": "softmax",
    "bmm": "matmul",
    "mm": "matmul",
    "__and__": "and",
    "and_": "and",
    "bitwise_and": "and",
    "logical_and": "and",
    "_to_copy": "to",
    "type_as": "to",
    "float": "to",
    "half": "to",
    "bfloat16": "to",
    "double": "to",
    "_unsafe_view": "view",
    "swapaxes": "transpose",
    "t": "transpose",
    "masked_fill_": "masked_fill",
    "feature_dropout": "dropout",
    "native_dropout": "dropout",
}

# Operations that move elements or change how they are laid out, and compute nothing.
LAYOUT = frozenset(
    {"view", "reshape", "transpose", "permute", "expand", "expand_as", "unsqueeze", "squeeze", "contiguous",
     "clone", "slice", "repeat", "repeat_interleave", "flatten", "unflatten", "movedim", "alias", "detach",
     "to", "select", "getitem", "index", "index_select", "split", "split_with_sizes", "chunk", "unbind",
     "narrow", "mT"}
)  # fmt: skip

# A linear map with weights: what projects hidden states to keys and values.
PROJECTIONS = frozenset({"linear", "addmm", "matmul"})

# Operations whose result depends on the shape of their input and not on its values.
SHAPE_ONLY = frozenset(
    {"sym_size", "size", "ones_like", "zeros_like", "empty_like", "full_like", "new_ones", "new_zeros",
     "new_empty", "new_full"}
)  # fmt: skip

# Operations that carry information from one token to another when applied along the sequence.
CUMULATIVE = frozenset({"cumsum", "cumprod", "logcumsumexp", "cummax"})
TOKEN_MIXING = CUMULATIVE | frozenset(
    {"conv1d", "convolution", "conv2d", "roll", "flip", "fft_fft", "fft_rfft", "lstm", "gru", "rnn_tanh",
     "associative_scan", "scan", "while_loop", "pad", "constant_pad_nd", "scatter", "logsumexp"}
)  # fmt: skip


def operation(node: fx.Node) -> str:
    """The normalised name of what `node` does; for a placeholder, attribute or output, its kind."""
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = _raw_name(node.target)
    return _SYNONYMS.get(name, name)


def _raw_name(target: object) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return target.overloadpacket.__name__
    if isinstance(target, OpOverloadPacket):
        return target.__name__
    return getattr(target, "__name__", str(target))


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An argument of a call by its position or name, or its default."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def is_active_dropout(node: fx.Node) -> bool:
    """Whether `node` is a dropout that really drops (training, with a probability above zero)."""
    if operation(node) != "dropout":
        return False
    training = argument(node, 2, "training", node.kwargs.get("train", True))
    return bool(training) and argument(node, 1, "p", 0.5) != 0


def tensor_of(node: object) -> Tensor | None:
    """The (fake) tensor that `node` yields, if it yields one."""
    value = node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def as_node(value: object) -> fx.Node:
    """`value`, which the caller knows to be a node and not a constant."""
    assert isinstance(value, fx.Node), value
    return value


def behind_layout(node: fx.Node, operations: Set[str] = LAYOUT) -> Iterator[fx.Node]:
    """`node`, what it is a rearrangement of, what that is one of, and so on. `operations`: what counts as one."""
    yield node
    while operation(node) in operations and node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node


def unarranged(node: fx.Node) -> fx.Node:
    """The node that `node` is a rearrangement of, itself if of none."""
    *_, source = behind_layout(node)
    return source


def graph_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The graph's placeholders, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]
