"""Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300): a number hidden in a long text, asked for at its end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.answering import all_ids, answer, check_positions
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.progress import progress_bar

SEED = 0
KEY_DIGITS = 5
ANSWER_TOKENS = KEY_DIGITS + 1  # at most: a space and every digit by itself
# The paper's words.
INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
SENTENCE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
LENGTHS = (2048,)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Passkey:
    """A text that hides `key`, int64 `[tokens]`; `depth` is where: 0 right after the introduction, 1 at the end."""

    key: str
    depth: float
    text: Tensor


@dataclass(frozen=True)
class Retrieval:
    """What a configuration answered, greedily, when asked for `key` after `tokens` tokens of text."""

    configuration: str
    tokens: int
    depth: float
    key: str
    answer: str

    @property
    def retrieved(self) -> bool:
        return self.answer.strip().startswith(self.key)


def hide_passkeys(tokenizer: PreTrainedTokenizerBase, lengths: Iterable[int], depths: Iterable[float]) -> list[Passkey]:
    """A key for every length (tokens of introduction, text and key) and depth, each key another one. The same arguments
    give the same keys.

    Raises InputError for a depth that is not from 0 to 1, and a length that leaves no room for a text.
    """
    random, depths = Random(SEED), tuple(depths)
    filler = all_ids(tokenizer, FILLER)
    return [_hide(tokenizer, filler, length, depth, random) for length in lengths for depth in depths]


def check_passkeys(
    configurations: Sequence[Configuration], tokenizer: PreTrainedTokenizerBase, passkeys: Sequence[Passkey]
) -> None:
    """Raise InputError where text, question and answer are more than a model has positions for."""
    longest = max((passkey.text.numel() for passkey in passkeys), default=0)
    needed = longest and longest + all_ids(tokenizer, QUESTION).numel() + ANSWER_TOKENS
    check_positions(configurations, needed, "a passkey's text, question and answer", "--passkey-length")


def retrieve(
    configurations: Sequence[Configuration],
    tokenizer: PreTrainedTokenizerBase,
    passkeys: Sequence[Passkey],
    progress: bool = False,
) -> list[Retrieval]:
    """What each configuration answers to each passkey.

    Raises InputError where text, question and answer are more than the model has positions for.
    """
    check_passkeys(configurations, tokenizer, passkeys)
    question, retrievals = all_ids(tokenizer, QUESTION), []
    with progress_bar("passkeys", len(passkeys) * len(configurations), progress) as advance:
        for passkey in passkeys:
            for configuration in configurations:
                written = answer(configuration, tokenizer, passkey.text, question, ANSWER_TOKENS)
                retrievals.append(
                    Retrieval(configuration.name, passkey.text.numel(), passkey.depth, passkey.key, written)
                )
                advance()
    return retrievals


def _hide(tokenizer: PreTrainedTokenizerBase, filler: Tensor, length: int, depth: float, random: Random) -> Passkey:
    if not 0 <= depth <= 1:
        raise InputError(f"a passkey's depth is from 0 (the beginning of the text) to 1 (its end), not {depth:g}")
    key = str(random.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))
    introduction, sentence = all_ids(tokenizer, INTRODUCTION), all_ids(tokenizer, SENTENCE.format(key=key))
    around = length - introduction.numel() - sentence.numel()
    if around < 1:
        raise InputError(
            f"a passkey's text of {length} tokens is too short: its introduction and the key are {length - around}"
        )
    text = filler.repeat(-(-around // filler.numel()))[:around]
    before = round(depth * around)
    return Passkey(key, depth, torch.cat([introduction, text[:before], sentence, text[before:]]))
