"""Text that the original writes itself. Read token by token, as when it is decoded, it shows whether errors add up."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.perplexity import read_rows
from kvmix_compile.progress import progress_bar

# One token is read at a time.
CHUNK = 1
TEXTS = 2
PROMPT_TOKENS = 32
SEED = 0


@torch.no_grad()
def written_text(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: int, progress: bool = False) -> Tensor:
    """TEXTS texts of so many tokens each, one behind the other, int64 `[TEXTS * tokens]`: what the model samples at
    temperature 1 after the first words of held-out English. The same arguments give the same text.

    Raises InputError where that is no more than the first words.
    """
    if tokens <= PROMPT_TOKENS:
        raise InputError(
            f"{tokens} tokens are no more than the first words of a text: decode more than {PROMPT_TOKENS}"
        )
    generator, cache = torch.Generator().manual_seed(SEED), DynamicCache()
    given = torch.stack([token_ids(tokenizer, passage, PROMPT_TOKENS) for passage in held_out_english()[:TEXTS]])
    parts = [given]
    with progress_bar("writing", tokens - PROMPT_TOKENS, progress) as advance:
        for _ in range(tokens - PROMPT_TOKENS):
            probabilities = read_rows(model, given, cache, logits_to_keep=1)[:, -1].float().softmax(-1).cpu()
            given = torch.multinomial(probabilities, 1, generator=generator)
            parts.append(given)
            advance()
    return torch.cat(parts, dim=1).flatten()
