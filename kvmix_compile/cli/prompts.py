"""Prompts: a text, or a conversation, as the model's tokenizer wants it."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kvmix_compile.errors import InputError

# As transformers' chat templates take it: {"role": "system", "user" or "assistant", "content": a text}.
Message = dict[str, str]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, request: str) -> str:
    """`request` as a user's message in the tokenizer's chat template, or as it is where there is none."""
    return _rendered(tokenizer, [{"role": "user", "content": request}]) if tokenizer.chat_template else request


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation, up to where the next answer begins. Without a chat template, the texts as they
    are, each of the user's on a line of its own.

    Raises InputError where the chat template refuses the messages, or there is none and a system message.
    """
    if tokenizer.chat_template:
        return _ids(tokenizer, _rendered(tokenizer, messages), add_special_tokens=False)
    if messages[0]["role"] == "system":
        raise InputError("this model's tokenizer has no chat template, so it takes no --system: leave it out")
    texts = ["\n" * (index > 0 and message["role"] == "user") + message["content"]
             for index, message in enumerate(messages)]  # fmt: skip
    return _ids(tokenizer, "".join(texts), add_special_tokens=True)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses this conversation: {error}") from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, verbose=False, **options)["input_ids"])
