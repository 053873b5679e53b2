"""One path: a graph of a model whose forward chooses among paths by what it computes.

Rotary frequencies that change with the text are such a choice. A graph of one path cannot replace the model, but it is
enough to measure on, as long as all that is measured takes that path.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._functorch import config as functorch_config

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture, logits_of
from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.graph.rounding import TOLERANCE


def capture_to_measure(model: nn.Module, most_tokens: int) -> Captured:
    """As `capture`; of a model with several paths, the one that all texts of up to `most_tokens` tokens take.

    Raises CaptureError, that of `capture`, where there is no such path.
    """
    try:
        with _no_log_of_failures():
            return capture(model)
    except CaptureError as refused:
        if refused.__cause__ is None:
            raise
        try:
            # The export computes its example too, and goes where that goes.
            with _no_log_of_failures(), functorch_config.patch(fake_tensor_propagate_real_tensors=True):
                captured = capture(model)
        except CaptureError:
            raise refused from refused.__cause__
        if not _agrees(captured, min(most_tokens, captured.longest_context or most_tokens)):
            raise refused from refused.__cause__
        return captured


@contextmanager
def _no_log_of_failures() -> Iterator[None]:
    """Where export cannot decide for all texts it logs the whole graph, and what it decided instead."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _agrees(captured: Captured, tokens: int) -> bool:
    """Whether the graph gives the model's logits for texts of two lengths."""
    for length in (min(16, tokens), tokens):
        ids = captured.random_ids(1, length)
        positions = torch.arange(length, device=ids.device)
        found, expected = captured.module(ids, positions[None], positions), logits_of(captured.original(ids))
        difference = (found - expected).float().square().mean().sqrt() / expected.float().std()
        if not difference <= TOLERANCE[captured.parameter.dtype]:
            return False
    return True
