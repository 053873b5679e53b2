"""Taken: what of a call the graph takes, and what is left to the model's own forward.

A graph takes token ids, masks of padding and one position for each token. Some arguments mean nothing for some calls:
token types of zero, or what described the images of a prompt and goes along with every token that is generated. Whether
they do is tried on the model itself.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kvmix_compile.passes.capture.export import logits_of
from kvmix_compile.passes.capture.signature import cache_in, caching, parameters_of
from kvmix_compile.runtime.padding import looks_at_masks
from kvmix_compile.runtime.program import Program

Forward = Callable[..., Any]

_EMBEDDINGS = "inputs_embeds"

# Tokens that are read before the one by which an argument is tried, and the values of one that types each token.
BEFORE = 5
TYPES = (0, 1, 2)

# The rows of positions in three dimensions, and with a row for the text in front of these.
ROWS = (3, 4)


def asks(value: object) -> bool:
    """Whether an argument asks for anything. transformers' generate gives models of images and text an empty dictionary
    where there is text alone.
    """
    return value is not None and value is not False and not (isinstance(value, Mapping) and not value)


def left_to_own_forward(
    program: Program,
    forward: Forward,
    input_ids: object,
    position_ids: Tensor | None,
    options: Mapping[str, Any],
    seen: int,
) -> tuple[Tensor | None, frozenset[str]]:
    """The names of those arguments of a call behind `seen` tokens that the graph does not take; none, where it takes
    them all, and the positions as it does. `forward`: the original's, on its twin. `options`: those that ask for
    anything.
    """
    left, row = set[str](), position_ids
    ids = input_ids if isinstance(input_ids, Tensor) and input_ids.dim() == 2 else None
    if ids is not None and isinstance(position_ids, Tensor) and position_ids.dim() == 3:
        row = _in_one_row(program, forward, position_ids, ids, seen)
        left |= {"position_ids"} if row is None else set()
    if ids is not None and ids.shape[1] > 1 and program.numbering.together:
        left.add("input_ids")
    if options:  # as in few steps of decoding
        # What the original takes by name means something to it; what falls into its **kwargs does not.
        for name in options.keys() & {_EMBEDDINGS, *parameters_of(forward)}:
            if ids is None or not _means_nothing(program, forward, name, options[name], ids, seen):
                left.add(name)
    return (position_ids if left else row), frozenset(left)


def _means_nothing(program: Program, forward: Forward, name: str, value: Any, ids: Tensor, seen: int) -> bool:
    """Whether an argument changes nothing of a call that reads `ids`, int64 `[batch, tokens]`, behind `seen` others."""
    if name in program.zero_token_types and _are_zeros(value, seen):
        return True
    if seen == 0 or ids.shape[1] > 1:
        return False
    types_tokens = isinstance(value, Tensor) and value.shape == ids.shape and not value.is_floating_point()
    known = program.ignored_in_steps.get(name)
    if isinstance(known, bool) and types_tokens:
        return known
    if known is value:
        return True
    values = [torch.full_like(value, kind) for kind in TYPES] if types_tokens else [value]
    is_ignored = _ignored_in_steps(program, forward, name, values, len(ids))
    if is_ignored or types_tokens:
        program.ignored_in_steps[name] = is_ignored if types_tokens else value
    return is_ignored


def _are_zeros(value: Any, seen: int) -> bool:
    """On a GPU those of a token that is decoded are looked at once in 32 steps, as masks are."""
    if not isinstance(value, Tensor):
        return False
    return not looks_at_masks(value.shape[-1], seen, value.device) or not bool(value.any())


def _in_one_row(program: Program, forward: Forward, position_ids: Tensor, ids: Tensor, seen: int) -> Tensor | None:
    """Positions `[3 or 4, batch, tokens]` as `[batch, tokens]`, where they say no more than that, otherwise None; those
    of a model that takes no such rows as they are.

    On a GPU the positions of a token that is decoded are looked at once in 32 steps, as masks are.
    """
    rows = len(position_ids)
    if rows not in ROWS or position_ids.shape[-1] != ids.shape[1] or not _takes_rows(program, forward, rows):
        return position_ids
    if looks_at_masks(ids.shape[1], seen, position_ids.device):
        first, others = position_ids[0], position_ids[-3:]
        distance = first - others[0]
        if not bool((others == others[:1]).all()) or not bool((distance == distance[:, :1]).all()):
            return None
    return position_ids[-1]


def _takes_rows(program: Program, forward: Forward, rows: int) -> bool:
    """Whether the model takes so many equal rows of positions for one."""
    if rows not in program.takes_rows:
        ids, positions = _text(program, 1)
        uncached, in_rows = caching(forward, False), positions.expand(rows, -1, -1)
        plain = _logits(forward, input_ids=ids, position_ids=positions, **uncached)
        of_rows = _logits(forward, input_ids=ids, position_ids=in_rows, **uncached)
        program.takes_rows[rows] = _are_equal(plain, of_rows)
    return program.takes_rows[rows]


def _ignored_in_steps(program: Program, forward: Forward, name: str, values: list[Any], batch: int) -> bool:
    """Whether the model gives the same logits for a token behind others with each of these values and without."""
    ids, positions = _text(program, batch)

    def step(**options: Any) -> Tensor | None:
        before, last = (dict(_positioned(program, part, where)) for part, where in _parts(ids, positions))
        held = cache_in(forward(**before, **caching(forward, True)))
        return _logits(forward, **last, **caching(forward, True), **{program.cache_name: held}, **options)

    plain = step()
    found = [step(**{name: value}) for value in values]
    return all(_are_equal(logits, plain) for logits in found)


def _text(program: Program, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(program.vocabulary, (batch, BEFORE + 1), generator=generator).to(program.device)
    return ids, torch.arange(BEFORE + 1, device=ids.device).expand(batch, -1).contiguous()


def _parts(ids: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield ids[:, :BEFORE], positions[:, :BEFORE]
    yield ids[:, BEFORE:], positions[:, BEFORE:]


def _positioned(program: Program, ids: Tensor, positions: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "input_ids", ids
    if program.numbering.is_input:
        yield "position_ids", positions


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _logits(forward: Forward, **arguments: Any) -> Tensor | None:
    """What the model gives; None where it does not take this."""
    try:
        return logits_of(forward(**arguments))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
