"""Prompts: a text as the model's tokenizer wants it."""

from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: PreTrainedTokenizerBase, request: str) -> str:
    """`request` as a user's message in the tokenizer's chat template, or as it is where there is none."""
    if not tokenizer.chat_template:
        return request
    messages = [{"role": "user", "content": request}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
