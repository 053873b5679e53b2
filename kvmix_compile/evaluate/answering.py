"""Answers through the cache: a text is read into it, and a question about the text comes when it is there.

So question and answer know of the text what the cache kept.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.held_out import token_ids
from kvmix_compile.evaluate.perplexity import read

# Within a chunk attention is in full precision: so the text is read in chunks, and the question is one of its own.
CHUNK = 256


def answer(
    configuration: Configuration, tokenizer: PreTrainedTokenizerBase, text: Tensor, question: Tensor, tokens: int
) -> str:
    """The `tokens` tokens that a configuration writes, greedily, after text and question, int64 `[tokens]` each."""
    model, cache = configuration.model, configuration.new_cache()
    for part in text.split(CHUNK):
        read(model, part, cache, logits_to_keep=1)
    written: list[int] = []
    given = question
    for _ in range(tokens):
        given = read(model, given, cache, logits_to_keep=1)[-1].argmax(-1, keepdim=True)
        written += given.tolist()
    return str(tokenizer.decode(written))


def check_positions(configurations: Sequence[Configuration], tokens: int, what: str, option: str) -> None:
    """Raise InputError where `tokens` tokens, those of `what`, are more than a model has positions for; `option` of the
    command line makes them fewer.
    """
    for configuration in configurations:
        longest = _positions(configuration.model)
        if longest is not None and tokens > longest:
            raise InputError(
                f"{what} are {tokens} tokens, and the model has {longest} positions: choose a smaller {option}"
            )


def all_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Every token id of a text, int64 `[tokens]`."""
    # No tokenizer makes more tokens than a text has bytes.
    return token_ids(tokenizer, text, len(text.encode()))


def _positions(model: Any) -> int | None:
    program = getattr(model, "kvmix_program", None)
    return getattr(model.config, "max_position_embeddings", None) if program is None else program.longest_context
