"""Free writing: what a model writes by itself, where errors feed on what they made.

A cache may pass every test of reading and still let a model lose its thread: answers that get longer, repeat
themselves and never end. So each configuration writes, greedily, and is held against what the original writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvmix_compile.evaluate.answering import all_ids
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.perplexity import read
from kvmix_compile.progress import progress_bar

PROMPTS = (
    "Write a long story about a lighthouse keeper who finds a map.",
    "Explain, step by step, how bread is made, from the field to the table.",
    "List twenty animals and say of each where it lives and what it eats.",
    "Write a Python program that reads a file and counts how often each word occurs, and explain every line.",
)
# More than any of them has, with what a chat's template adds.
LONGEST_PROMPT = 200
# How many tokens in a row must have come before to count as a repetition.
REPEATED = 8


@dataclass(frozen=True)
class Writing:
    """What a configuration writes after a prompt, greedily.

    tokens: written, the end of the text included where it came (`ended`).
    first_difference: the number of the first token that is not the original's; None where all are.
    repetition: the share of the tokens that end REPEATED tokens which the text had before, from 0 to 1.
    """

    configuration: str
    prompt: str
    tokens: int
    ended: bool
    first_difference: int | None
    repetition: float
    text: str


@torch.no_grad()
def write(
    configurations: Sequence[Configuration],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    progress: bool = False,
) -> list[Writing]:
    """What each configuration writes after each of PROMPTS, `tokens` tokens at most; the first one is the original."""
    found = []
    with progress_bar("writing", len(PROMPTS) * len(configurations), progress) as advance:
        for prompt in PROMPTS:
            given, expected = prompt_ids(tokenizer, prompt), None
            for configuration in configurations:
                written = _written(configuration, given, tokens, tokenizer.eos_token_id)
                expected = written if expected is None else expected
                found.append(
                    Writing(
                        configuration.name,
                        prompt,
                        tokens=len(written),
                        ended=written[-1] == tokenizer.eos_token_id,
                        first_difference=first_difference(written, expected),
                        repetition=repetition(written),
                        text=str(tokenizer.decode(written)),
                    )
                )
                advance()
    return found


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """A prompt as the model was trained to be asked, where its tokenizer knows; int64 `[tokens]`."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return all_ids(tokenizer, prompt)


def first_difference(written: Sequence[int], expected: Sequence[int]) -> int | None:
    """Where two texts differ first, from 0; None where they do not."""
    for place, pair in enumerate(zip(written, expected, strict=False)):
        if pair[0] != pair[1]:
            return place
    return None if len(written) == len(expected) else min(len(written), len(expected))


def repetition(written: Sequence[int]) -> float:
    """The share of the tokens that end REPEATED tokens which came before, from 0 to 1."""
    runs = [tuple(written[begin : begin + REPEATED]) for begin in range(len(written) - REPEATED + 1)]
    return (len(runs) - len(set(runs))) / len(written)


def _written(configuration: Configuration, prompt: Tensor, tokens: int, end: int | None) -> list[int]:
    cache, given, written = configuration.new_cache(), prompt, list[int]()
    while len(written) < tokens and (not written or written[-1] != end):
        given = read(configuration.model, given, cache, logits_to_keep=1)[-1].argmax(-1, keepdim=True)
        written += given.tolist()
    return written
