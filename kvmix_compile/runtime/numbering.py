"""Numbering: which positions a model counts where it is given none, found by giving it none.

A text with padding is run by the model and by its twin: the numbering with which the twin gives the model's logits is
the model's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvmix_compile.errors import InputError
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import logits_of
from kvmix_compile.passes.capture.signature import parameters_of
from kvmix_compile.passes.graph.rounding import TOLERANCE, difference
from kvmix_compile.passes.rewrite.together import reads_together

# Of the text that is run: how long it is, and where there is padding in it, between tokens too. Where that cannot be,
# the distance of tokens from each other does not show which way they are counted, and in front is enough.
TOKENS = 12
IN_FRONT, BETWEEN = (0, 1, 2), (5, 6)
# The one way is taken for right, where the other one's difference is so many times as large.
CLEARLY = 8


@dataclass(frozen=True)
class Numbering:
    """What a model's forward makes of positions.

    is_input: they can be given to it, as `position_ids`. has_mask: it takes an `attention_mask`. from_zero: without
    padding it numbers the slots of a row 0, 1, 2, .. padded: what it numbers so in a row with padding, all slots or
    the tokens alone; None: neither, or it takes no padding. together: the tokens of one call see each other, later ones
    too, and only from call to call it reads in order.
    """

    is_input: bool = True
    has_mask: bool = True
    from_zero: bool = True
    padded: Literal["slots", "tokens"] | None = None
    together: bool = False


# Runs the twin as if the model numbered so: (numbering, input_ids, attention_mask) -> logits, with nothing cached.
Run = Callable[[Numbering, Tensor, Tensor | None], Tensor]


def find_numbering(captured: Captured, run: Run) -> Numbering:
    """How the captured model numbers slots. `run`: its twin."""
    trial = _Trial(captured, run, captured.random_ids(1, min(TOKENS, captured.longest_context or TOKENS)))
    taken = parameters_of(captured.original.forward)
    numbering = Numbering("position_ids" in taken, "attention_mask" in taken)
    (share,) = trial.shares([numbering])
    numbering = replace(numbering, from_zero=share <= trial.tolerance)
    if not numbering.from_zero and reads_together(captured):
        return replace(numbering, together=True)
    if not numbering.has_mask:
        # Its own rows are never padded; a twin's may be, and count their own tokens.
        return replace(numbering, padded="tokens" if numbering.is_input else None)
    for padding in ((*IN_FRONT, *BETWEEN), IN_FRONT):
        slots, tokens = trial.shares([replace(numbering, padded=padded) for padded in ("slots", "tokens")], padding)
        if min(slots, tokens) <= trial.tolerance:
            return replace(numbering, padded="tokens" if tokens * CLEARLY < slots else "slots")
    return numbering


def ignores_zeros(captured: Captured, name: str) -> bool:
    """Whether the argument `name` of its forward, `[batch, tokens]`, may be left out where all of it is zero."""
    model, ids = captured.original, captured.random_ids(1, 1)
    with torch.no_grad():
        return torch.equal(_logits(model, ids, {}), _logits(model, ids, {name: torch.zeros_like(ids)}))


@dataclass(frozen=True)
class _Trial:
    """One text, `ids`, run by the model and by its twin."""

    captured: Captured
    run: Run
    ids: Tensor

    @torch.no_grad()
    def shares(self, numberings: Sequence[Numbering], padding: Sequence[int] = ()) -> list[float]:
        """For each numbering the worst token's difference, as a share of the logits' standard deviation; infinite where
        the twin refuses `padding` at such slots.
        """
        mask = None
        if padding:
            mask = torch.ones_like(self.ids)
            mask[:, [slot for slot in padding if slot < self.ids.shape[1] - 1]] = 0
        twins = [self._of_twin(numbering, mask) for numbering in numberings]
        if all(twin is None for twin in twins):
            return [torch.inf] * len(twins)
        model = _logits(self.captured.original, self.ids, {} if mask is None else {"attention_mask": mask}).float()
        is_token = torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask.bool()
        return [torch.inf if twin is None else difference(twin[is_token], model[is_token]) for twin in twins]

    def _of_twin(self, numbering: Numbering, mask: Tensor | None) -> Tensor | None:
        """The twin's logits, float32 `[1, tokens, vocabulary]`; None where it refuses the padding."""
        try:
            return self.run(numbering, self.ids, mask).float()
        except InputError:
            return None

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.captured.parameter.dtype]


def _logits(model: nn.Module, ids: Tensor, options: Mapping[str, Any]) -> Tensor:
    no_cache = {"use_cache": False} if "use_cache" in parameters_of(model.forward) else {}
    return logits_of(model(ids, **no_cache, **options))
