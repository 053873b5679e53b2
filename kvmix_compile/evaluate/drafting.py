"""Drafting: what assisted generation gains, where tokens that are proposed are read several at a time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kvmix_compile.evaluate.arrival import arriving_text
from kvmix_compile.evaluate.configurations import Compiled, Configuration
from kvmix_compile.evaluate.perplexity import read
from kvmix_compile.progress import progress_bar
from kvmix_compile.runtime.cache import KVMixCache

# A passage and its beginning once more: a model that goes on with it finds its next words in the prompt.
PASSAGE_TOKENS = 300
AGAIN_TOKENS = 40
WRITTEN_TOKENS = 96
TOKENS = PASSAGE_TOKENS + AGAIN_TOKENS + WRITTEN_TOKENS
PROPOSED_TOKENS = 10
QUERIES = (1, 2, 4, 8, 16)
ROUNDS = 5


@dataclass(frozen=True)
class Drafting:
    """Greedy generation with tokens that are looked up in the prompt.

    tokens_a_step: written in a step of the model, its own token and those of the proposed ones that it accepts.
    same_text: whether it writes what it writes without proposals.
    step_seconds: median time of a step with so many new tokens, after the prompt.
    """

    configuration: str
    tokens_a_step: float
    same_text: bool
    step_seconds: Mapping[int, float]


def repeating_prompt(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Built-in text that begins again, int64 `[PASSAGE_TOKENS + AGAIN_TOKENS]`."""
    passage = arriving_text(tokenizer, PASSAGE_TOKENS)[:PASSAGE_TOKENS]
    return torch.cat([passage, passage[:AGAIN_TOKENS]])


@torch.no_grad()
def draft(configurations: Sequence[Configuration], prompt: Tensor, progress: bool = False) -> list[Drafting]:
    """Of each configuration whose cache can take tokens back: this project's own, and the original."""
    chosen = [each for each in configurations if isinstance(each, Compiled) or type(each) is Configuration]
    found = []
    with progress_bar("drafts", len(chosen), progress) as advance:
        for configuration in chosen:
            model = configuration.model
            with _counted(model) as steps:
                text = _written(model, prompt, prompt_lookup_num_tokens=PROPOSED_TOKENS)
            found.append(
                Drafting(
                    configuration.name,
                    tokens_a_step=len(text) / len(steps),
                    same_text=torch.equal(text, _written(model, prompt)),
                    step_seconds=_times(configuration, prompt),
                )
            )
            advance()
    return found


def _written(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    device = next(model.parameters()).device
    text: Tensor = model.generate(
        prompt[None].to(device), do_sample=False, min_new_tokens=WRITTEN_TOKENS, max_new_tokens=WRITTEN_TOKENS,
        pad_token_id=0, **options,
    )  # fmt: skip
    # transformers before 5.24 goes on beyond the end with what it looks up.
    return text[0, len(prompt) : len(prompt) + WRITTEN_TOKENS].cpu()


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[None]]:
    """One entry for each call of the model."""
    calls: list[None] = []
    hook = model.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def _times(configuration: Configuration, prompt: Tensor) -> dict[int, float]:
    model = configuration.model
    past: Any = KVMixCache(model, rollback=max(QUERIES)) if isinstance(configuration, Compiled) else None
    past = past or configuration.new_cache()
    read(model, prompt, past)
    times: dict[int, list[float]] = {queries: [] for queries in QUERIES}
    for _ in range(ROUNDS):
        for queries in QUERIES:
            start = perf_counter()
            read(model, prompt[:queries], past)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[queries].append(perf_counter() - start)
            past.crop(-queries)
    return {queries: median(found) for queries, found in times.items()}
