"""Held-out English: built-in text that the default calibration never sees, to evaluate on."""

from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvmix_compile.english import built_in_english


def held_out_english() -> list[str]:
    """The later half of the built-in passages, without those that share a paragraph with the earlier half.

    Calibration takes its 4096 tokens from the beginning, some sixteen passages of sixty. Raises ImportError as
    `built_in_english` does.
    """
    passages = built_in_english()
    earlier, later = passages[: len(passages) // 2], passages[len(passages) // 2 :]
    seen = set(chain.from_iterable(_paragraphs(passage) for passage in earlier))
    return [passage for passage in later if seen.isdisjoint(_paragraphs(passage))]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> Tensor:
    """The first `tokens` token ids of a text, int64 `[tokens]`, fewer where it ends sooner; no special ones."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return torch.tensor(ids[:tokens], dtype=torch.int64)


def _paragraphs(passage: str) -> list[str]:
    return passage.split("\n\n")
