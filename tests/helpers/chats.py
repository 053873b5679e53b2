"""The tiny models' tokenizer, for chats too, and a text that is long enough to be stored in all three ways."""

from transformers import PreTrainedTokenizerFast

from kvmix_compile.models_zoo.characters import character_tokenizer

# The messages one behind another, and nothing else.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT = "One ring to rule them all, one ring to find them. " * 2


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The characters' tokenizer with a chat template."""
    made = character_tokenizer()
    made.chat_template = TEMPLATE
    return made
