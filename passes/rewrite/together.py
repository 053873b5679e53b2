"""Together: models whose tokens of one call see each other, later ones too, and that read in order from call to call.

Such are models of images and text whose prompt is a prefix. Generating, one token a call, they are what their graph
says; what comes in a call of several tokens is left to the model itself.
"""

import torch

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.graph.rounding import TOLERANCE, difference
from kvmix_compile.passes.rewrite import original

TOKENS = 12


@torch.no_grad()
def reads_together(captured: Captured) -> bool:
    """Whether the captured graph gives the model's logits where that reads one token a call, and not where it reads
    several.
    """
    tokens = min(TOKENS, captured.longest_context or TOKENS)
    ids, tolerance = captured.random_ids(1, tokens), TOLERANCE[captured.parameter.dtype]
    graph = captured.module(*captured.inputs(ids[0])).float()
    if difference(graph, original.whole(captured.original, ids)) <= tolerance:
        return False
    one_by_one = original.in_chunks(captured.original, ids, [1] * tokens)
    return one_by_one is not None and difference(graph, one_by_one) <= tolerance
