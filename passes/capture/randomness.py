"""Randomness: a forward that draws random numbers gives other logits each time, or those of a generator that it makes
anew each time and a graph would not.
"""

from torch import fx

from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.vocabulary import operation

_DRAWING = frozenset(
    {"bernoulli", "binomial", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal", "poisson",
     "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random", "randperm", "uniform"}
)  # fmt: skip


def refuse_randomness(graph: fx.Graph) -> None:
    """Raise CaptureError, naming the operation, where a result depends on random numbers; what is drawn and never used
    is dropped. In place. Dropout is not looked at: there are models that leave it in and turn it off.
    """
    for node in reversed(graph.nodes):
        if operation(node).removesuffix("_") not in _DRAWING:
            continue
        if node.users:
            raise CaptureError(
                f"the model's forward draws random numbers ({operation(node)}), so that no other graph can give its "
                "logits: draw them once, when the model is made, and keep them in a buffer"
            )
        graph.erase_node(node)
