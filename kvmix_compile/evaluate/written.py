"""Text that the original writes itself. Read token by token, as when it is decoded, it shows whether errors add up."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.perplexity import read

# One token is read at a time.
CHUNK = 1
TEXTS = 2
PROMPT_TOKENS = 32
SEED = 0


@torch.no_grad()
def written_text(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    """TEXTS texts of so many tokens each, one behind the other, int64 `[TEXTS * tokens]`: what the model samples at
    temperature 1 after the first words of held-out English. The same arguments give the same text.

    Raises InputError where that is no more than the first words.
    """
    if tokens <= PROMPT_TOKENS:
        raise InputError(
            f"{tokens} tokens are no more than the first words of a text: decode more than {PROMPT_TOKENS}"
        )
    generator = torch.Generator().manual_seed(SEED)
    prompts = [token_ids(tokenizer, passage, PROMPT_TOKENS) for passage in held_out_english()[:TEXTS]]
    return torch.cat([_continued(model, prompt, tokens, generator) for prompt in prompts])


def _continued(model: nn.Module, prompt: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    cache, parts, given = DynamicCache(), [prompt], prompt
    for _ in range(tokens - prompt.numel()):
        probabilities = read(model, given, cache, logits_to_keep=1)[-1].float().softmax(-1).cpu()
        given = torch.multinomial(probabilities, 1, generator=generator)
        parts.append(given)
    return torch.cat(parts)
