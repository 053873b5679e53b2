"""State trials: a module that is fed a text in parts, its state carried, must give what it gives in one go."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kvmix_compile.passes.capture.held import held_at
from kvmix_compile.passes.capture.single_nodes import StatefulModule
from kvmix_compile.passes.graph.rounding import TOLERANCE, difference

# Where a text is cut: several tokens on a state, single ones, and a single one that begins.
PARTS: tuple[tuple[int, ...], ...] = ((5, 1, 2, 1), (1, 3, 1))
By = Literal["parts", "tokens"]


@torch.no_grad()
def goes_on_by(module: nn.Module, stateful: StatefulModule, given: Sequence[Tensor]) -> By | None:
    """Whether the module goes on from its state by any number of tokens, or rightly by single ones alone; None: by
    neither, or it keeps something else than its states.

    given: the tensors of a call.
    """
    whole, _ = stateful.run(module, given, None)
    tokens = stateful.tokens_of(given)
    ways: tuple[By, ...] = ("parts", "tokens")
    for by in ways:
        cuts = [_cuts(parts, tokens, by) for parts in PARTS]
        if all(_agrees(module, stateful, given, whole, cut) for cut in cuts):
            return by
    return None


def _cuts(parts: tuple[int, ...], tokens: int, by: By) -> list[int]:
    """The sizes of the parts of a text, the first of which is read in one go."""
    left = tokens - sum(parts)
    sizes = [*parts, left]
    return sizes if by == "parts" else [sizes[0], *[1] * (tokens - sizes[0])]


def _agrees(
    module: nn.Module, stateful: StatefulModule, given: Sequence[Tensor], whole: object, parts: Sequence[int]
) -> bool:
    results, states, begin = [], None, 0
    for size in parts:
        output, states = stateful.run(module, stateful.part(given, begin, begin + size), states)
        results.append(output)
        begin += size
    assert states is not None
    if any(
        (state.dtype, state.shape[1:]) != (sizes.dtype, sizes.extents[1:])
        for state, sizes in zip(states, stateful.states, strict=True)
    ):
        return False
    for way, sizes in zip(stateful.result_ways, stateful.results, strict=True):
        if sizes.token_axis is None:
            continue
        axis = sizes.token_axis
        expected = held_at(whole, way).float().movedim(axis, -2)
        found = torch.cat([held_at(result, way) for result in results], axis).float().movedim(axis, -2)
        if not difference(found, expected) <= TOLERANCE.get(sizes.dtype, 0.0):
            return False
    return True
