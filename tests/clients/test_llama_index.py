"""LlamaIndex: a compiled model as its HuggingFaceLLM."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.helpers.chats import PROMPT, chat_tokenizer
from tests.helpers.toy_llama import lossless, original

huggingface = pytest.importorskip("llama_index.llms.huggingface")
llms = pytest.importorskip("llama_index.core.llms")

MESSAGES = [llms.ChatMessage(role="user", content=PROMPT)]

WAYS: dict[str, Callable[[Any], Any]] = {
    "a text": lambda llm: llm.complete(PROMPT).text,
    "streamed": lambda llm: [part.delta for part in llm.stream_complete(PROMPT)],
    "a chat": lambda llm: llm.chat(MESSAGES).message.content,
    "a chat, streamed": lambda llm: [part.delta for part in llm.stream_chat(MESSAGES)],
}


def language_model(model: PreTrainedModel) -> Any:
    return huggingface.HuggingFaceLLM(
        model=model, tokenizer=chat_tokenizer(), max_new_tokens=12, generate_kwargs={"do_sample": False}
    )


@pytest.mark.parametrize("way", WAYS)
def test_it_writes_what_it_writes_with_the_original(way: str) -> None:
    found = WAYS[way](language_model(lossless()))
    assert found == WAYS[way](language_model(original())) and found
