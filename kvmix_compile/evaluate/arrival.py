"""Arrival: whether a model answers alike however a text came into its cache.

In one go, in chunks, token by token, from a file, from a copy in memory: a serving engine does all of these, and what
comes from a prefix cache must not be read otherwise than what comes from a prompt.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.configurations import Compiled, Configuration
from kvmix_compile.evaluate.divergence import Predictions, Reference
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.perplexity import read
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.progress import progress_bar
from kvmix_compile.runtime.cache import KVMixCache

TOKENS = 1000
# The text that follows, and the answer that is written instead of it.
FOLLOWING_TOKENS = 64
ANSWER_TOKENS = 32
DECODED = "token by token"


@dataclass(frozen=True)
class Arrival:
    """What a configuration makes of a text that came in one of WAYS.

    divergence: mean KL divergence from the original, in nats, over the tokens that follow.
    from_decoded: the same from this configuration itself after a text that came token by token.
    same_answer: whether what it writes behind the text, greedily, is what it writes then.
    """

    configuration: str
    way: str
    divergence: float
    from_decoded: float
    same_answer: bool


def arriving_text(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    """Held-out English, int64 `[tokens + FOLLOWING_TOKENS]`. Raises InputError where there is less of it."""
    text = token_ids(tokenizer, "\n\n".join(held_out_english()), tokens + FOLLOWING_TOKENS)
    if len(text) < tokens + FOLLOWING_TOKENS:
        raise InputError(f"there are {len(text) - FOLLOWING_TOKENS} tokens of built-in text: choose a smaller --ways")
    return text


@torch.no_grad()
def arrivals(
    original: Configuration, configurations: Sequence[Compiled], text: Tensor, progress: bool = False
) -> list[Arrival]:
    """Of each configuration one for each of WAYS. text: as of arriving_text.

    Raises InputError for a text of which nothing would be quantized.
    """
    prefix, following = text[:-FOLLOWING_TOKENS], text[-FOLLOWING_TOKENS:]
    needed = max(configuration.unquantized_tokens for configuration in configurations) + BLOCK_TOKENS
    if len(prefix) <= needed:
        raise InputError(f"of {len(prefix)} tokens nothing is quantized: choose more than {needed} for --ways")
    past = original.new_cache()
    first = read(original.model, prefix, past, logits_to_keep=1)
    expected = torch.cat([first, read(original.model, following, past)])[:-1]
    found: list[Arrival] = []
    with progress_bar("ways to come in", len(configurations) * len(WAYS), progress) as advance:
        for configuration in configurations:
            decoded: tuple[Tensor, list[int]] | None = None
            for way, bring in WAYS.items():
                seen = _seen(configuration, bring, prefix, following)
                decoded = decoded or seen
                found.append(
                    Arrival(
                        configuration.name,
                        way,
                        divergence=_divergence(seen[0], expected, following),
                        from_decoded=_divergence(seen[0], decoded[0], following),
                        same_answer=seen[1] == decoded[1],
                    )
                )
                advance()
    return found


def _seen(
    configuration: Compiled, bring: "Callable[[Compiled, Tensor], tuple[KVMixCache, Tensor]]", prefix: Tensor,
    following: Tensor,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """The logits of the text that follows, and the answer."""
    model = configuration.model
    past, last = bring(configuration, prefix)
    kept, given, answer = copy.deepcopy(past), last, list[int]()
    for _ in range(ANSWER_TOKENS):
        token = given[-1].argmax(-1, keepdim=True)
        answer += token.tolist()
        given = read(model, token, kept)
    logits = [last[-1:], *(read(model, token, past) for token in following.split(1))]
    return torch.cat(logits)[:-1], answer


def _divergence(logits: Tensor, expected: Tensor, targets: Tensor) -> float:
    predictions = Predictions(len(targets))
    predictions.add(logits, Reference.of(expected), targets.to(logits.device), 0)
    return predictions.divergence().mean


def _in_chunks(tokens: int | None) -> Callable[[Compiled, Tensor], tuple[KVMixCache, Tensor]]:
    def bring(configuration: Compiled, text: Tensor) -> tuple[KVMixCache, Tensor]:
        past = configuration.new_cache()
        for part in text.split(tokens or len(text)):
            last = read(configuration.model, part, past, logits_to_keep=1)
        return past, last

    return bring


def _saved(configuration: Compiled, text: Tensor) -> tuple[KVMixCache, Tensor]:
    past, last = _in_chunks(None)(configuration, text)
    with TemporaryDirectory() as folder:
        past.save(Path(folder) / "text")
        return KVMixCache.load(Path(folder) / "text", configuration.model), last


def _copied(configuration: Compiled, text: Tensor) -> tuple[KVMixCache, Tensor]:
    past, last = _in_chunks(None)(configuration, text)
    return copy.deepcopy(past), last


# The first is the one that the others are held against.
WAYS: Mapping[str, Callable[[Compiled, Tensor], tuple[KVMixCache, Tensor]]] = {
    DECODED: _in_chunks(1),
    "chunks of 64": _in_chunks(64),
    "chunks of 512": _in_chunks(512),
    "in one go": _in_chunks(None),
    "saved and loaded": _saved,
    "copied": _copied,
}
