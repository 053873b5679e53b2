"""Padding: what an attention mask says of the rows of a batch, and how a row with padding in it is run.

A row is stored without its padding. The operators know padding that leads a row, so a row whose tokens have padding
between or behind them is run with all of its padding in front, and its logits are put back where its tokens were.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmix_compile.errors import CacheError, InputError
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.passes.rewrite.rewrite import Rewritten
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.numbering import Numbering

# Padding that nobody put there, and where it belongs.
ADVICE = (
    "pad on the left (tokenizer.padding_side = 'left'); where generate was given no attention_mask and took "
    "pad_token_id in the text for padding, pass attention_mask=torch.ones_like(input_ids)"
)


@dataclass(frozen=True)
class Padding:
    """What is padding among the coming slots of each row, `tokens` of them.

    starts: how many, int64 `[batch]`. order: the slots of a row's padding and then those of its tokens, int64
    `[batch, tokens]`; None where padding leads every row. comes: there is some. there_is_some: there is, or was in
    earlier calls. is_enclosed: in some row a coming token has padding between it and an earlier token. ends_a_text: the
    last slot of some row is padding behind tokens. ends_a_row: the last slot of some row is padding.
    """

    starts: Tensor
    order: Tensor | None = None
    comes: bool = False
    there_is_some: bool = False
    is_enclosed: bool = False
    ends_a_text: bool = False
    ends_a_row: bool = False

    def arrange(self, values: Tensor) -> Tensor:
        """`values`, `[batch, tokens]` by slot, with each row's padding in front."""
        return values if self.order is None else values.gather(1, self.order)

    def columns(self, slots: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the logits of `slots`, int64 `[slots]`, come from: the columns, int64 `[columns]`, of what `arrange`
        gave that are to be computed, and which of these is each row's, int64 `[batch, slots]`; None: each in turn.
        """
        if self.order is None:
            return slots, None
        wanted = self.order.argsort(dim=1)[:, slots]
        columns, which = wanted.unique(return_inverse=True)
        return columns, which


def put_back(logits: Tensor, which: Tensor | None) -> Tensor:
    """Logits `[batch, slots, vocabulary]` of the columns that `Padding.columns` gave."""
    if which is None:
        return logits
    return logits[torch.arange(len(logits), device=logits.device)[:, None], which]


def read_padding(
    attention_mask: Tensor | None, cache: KVMixCache, batch: int, tokens: int, device: torch.device
) -> Padding:
    """What the mask says of the coming `tokens`.

    `attention_mask`: 1 for tokens and 0 for padding, `[batch, tokens seen + tokens]`. Raises CacheError for another
    shape, or a mask that does not agree with what the cache holds, as far as `looks_at_masks`: since a mask goes back
    to the first token, what was wrong in between is found then. On a CPU that is before anything is changed.
    """
    cache.check_batch(batch)
    none = torch.zeros(batch, dtype=torch.int64, device=device)
    if attention_mask is None:
        if cache.holds_padding():
            raise CacheError(
                "the cache holds rows with padding, and no attention_mask was given: pass that of earlier calls, with "
                "1 added for each new token"
            )
        return Padding(none)
    expected = [batch, cache.seen + tokens]
    if not isinstance(attention_mask, Tensor) or list(attention_mask.shape) != expected:
        given = f"has the shape {list(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else "is no tensor"
        raise CacheError(
            f"attention_mask {given}; it must be [batch, tokens], here {expected}, those of earlier calls included, 1 "
            "for a token and 0 for padding. Other masks are the model's own and need not be passed"
        )
    if cache.every_row_goes_on and not looks_at_masks(tokens, cache.seen, device):
        return Padding(none, there_is_some=cache.padded)
    valid = attention_mask.to(device) != 0
    if not cache.padded and bool(valid.all()):
        return Padding(none)
    lengths = cache.lengths if cache.states else none
    if tokens == 1 and cache.every_row_goes_on and _every_row_goes_on(valid, lengths):
        return Padding(none, there_is_some=True)
    return _read(valid, lengths, tokens)


def _every_row_goes_on(valid: Tensor, lengths: Tensor) -> bool:
    """Whether a single token comes in every row, and before it are as many as are held."""
    return bool((valid[:, -1] & (valid[:, :-1].sum(dim=1) == lengths)).all())


def _read(valid: Tensor, lengths: Tensor, tokens: int) -> Padding:
    """`valid`: where tokens are, boolean `[batch, slots seen + tokens]`; `lengths`: of what is held."""
    held, coming = valid[:, :-tokens], valid[:, -tokens:]
    starts = tokens - coming.sum(dim=1)
    last = valid[:, -1]
    inner = valid.shape[1] - valid.sum(dim=1) - _leading(~valid) - _leading(~valid.flip(1))
    wrong, moved, comes, inside, ends_a_text, ends_a_row, some = torch.stack(
        [
            (held.sum(dim=1) != lengths).any(),
            (_leading(~coming) != starts).any(),
            (~coming).any(),
            ((inner > 0) & coming.any(dim=1)).any(),
            (~last & valid.any(dim=1)).any(),
            (~last).any(),
            (~valid).any(),
        ]
    ).cpu()
    if wrong:
        raise CacheError(
            "attention_mask masks tokens that the cache already holds, or has tokens where it holds none: keep the "
            f"mask of earlier calls, with 1 added for each new token, and {ADVICE}"
        )
    order = coming.to(torch.uint8).argsort(dim=1, stable=True) if moved else None
    return Padding(starts, order, bool(comes), bool(some), bool(inside), bool(ends_a_text), bool(ends_a_row))


def note_padding(cache: KVMixCache, padding: Padding) -> None:
    """Have the cache know what the host knows of the rows that it was given, once it holds them."""
    cache.every_row_goes_on = not padding.ends_a_row
    cache.padded = cache.padded or padding.there_is_some


def check_padding(padding: Padding, rewritten: Rewritten, numbering: Numbering, seen: int, ends_are_kept: bool) -> None:
    """Raise InputError for padding of which the model makes something that the operators do not.

    `seen`: slots of earlier calls. `ends_are_kept`: whether the logits of the last slot of each row are asked for, and
    not all.
    """
    if rewritten.carried:
        _check_carried(padding, rewritten, numbering, seen)
    moved = padding.order is not None or padding.is_enclosed
    if not takes_padding(rewritten, numbering) or (rewritten.equal_rows and moved):
        left = "" if numbering.is_input or numbering.padded is None else "pad on the left, or "
        raise InputError(
            "this model counts its positions itself, from the beginning of the batch, so its rows cannot be padded so: "
            f"{left}pass rows of equal length, one at a time if need be"
        )
    measured = [function for function in rewritten.score_functions if function.mask.kind != "causal" or function.slopes]
    if padding.is_enclosed and measured:
        raise InputError(
            f"attention_mask has padding between the tokens of a row, and in this model ({measured[0]}) it counts how "
            f"far apart they are: {ADVICE}"
        )
    if padding.ends_a_text and ends_are_kept:
        raise InputError(
            "attention_mask has padding after the last token of a row, and logits_to_keep asks for what would follow "
            f"the padding: {ADVICE}"
        )


def _check_carried(padding: Padding, rewritten: Rewritten, numbering: Numbering, seen: int) -> None:
    """Raise InputError for padding that would go into the states of layers."""
    layer = rewritten.carried[0].layer
    if not takes_padding(rewritten, numbering):
        raise InputError(
            f"{layer} carries a state from token to token, into which padding goes otherwise than in the original: "
            "pass rows of equal length, one at a time if need be"
        )
    if seen and padding.comes:
        raise InputError(
            f"attention_mask has padding behind what the cache holds, and {layer} carries a state from token to token, "
            "into which it would go: pad on the left, in the first call alone"
        )
    if padding.order is not None or padding.is_enclosed:
        raise InputError(
            f"attention_mask has padding between or behind the tokens of a row, and {layer} carries a state from token "
            f"to token, into which it would go: {ADVICE}"
        )


def takes_padding(rewritten: Rewritten, numbering: Numbering) -> bool:
    """Whether rows may begin with padding, as batches of prompts of several lengths do."""
    if numbering.is_input and not rewritten.carried:
        return not rewritten.equal_rows
    return numbering.has_mask and numbering.padded is not None


def _leading(padding: Tensor) -> Tensor:
    """How many slots lead each row of a boolean `[batch, slots]` that are True, int64 `[batch]`."""
    return padding.cumprod(dim=1).sum(dim=1)


def looks_at_masks(tokens: int, seen: int, device: torch.device) -> bool:
    """Whether to look at the mask of a call of so many tokens. On a GPU that of a step of decoding is looked at once in
    32 steps, so that the host need not wait for the device.
    """
    return tokens > 1 or seen % BLOCK_TOKENS == 0 or not reading_waits(device)


def reading_waits(device: torch.device) -> bool:
    """Whether to read a number off a tensor means to wait for the device."""
    return device.type != "cpu"
