"""LangChain: a pipeline of a compiled model as its language model, and `kvmix serve` as its OpenAI."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel, pipeline

from kvmix_compile.cli.serve import serve_model
from tests.helpers.chats import PROMPT, chat_tokenizer
from tests.helpers.toy_llama import lossless, original, quantized

huggingface = pytest.importorskip("langchain_huggingface")
openai = pytest.importorskip("langchain_openai")

WAYS: dict[str, Callable[[Any], Any]] = {
    "a text": lambda llm: llm.invoke(PROMPT),
    "a batch": lambda llm: llm.batch([PROMPT, PROMPT[:70]]),
    "streamed": lambda llm: list(llm.stream(PROMPT)),
    "a chat": lambda llm: chat(llm).invoke(PROMPT).content,
    "a chat, streamed": lambda llm: [part.content for part in chat(llm).stream(PROMPT)],
}


def language_model(model: PreTrainedModel) -> Any:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    pipe = pipeline("text-generation", model=model, tokenizer=chat_tokenizer(), **options)
    return huggingface.HuggingFacePipeline(pipeline=pipe)


def chat(llm: Any) -> Any:
    return huggingface.ChatHuggingFace(llm=llm, tokenizer=chat_tokenizer())


@pytest.mark.parametrize("way", WAYS)
def test_it_writes_what_it_writes_with_the_original(way: str) -> None:
    found = WAYS[way](language_model(lossless()))
    assert found == WAYS[way](language_model(original())) and found


def test_it_talks_to_the_server() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = serve_model(quantized(), chat_tokenizer(), "toy", "localhost", port, wait=False)
    address: dict[str, Any] = {"base_url": f"http://localhost:{port}/v1", "api_key": "none", "model": "toy"}
    served = openai.ChatOpenAI(**address, temperature=0, max_tokens=12, max_retries=20)
    try:
        answer = served.invoke(PROMPT).content
        streamed = [part.content for part in served.stream(PROMPT)]
    finally:
        server.kill_server()
    assert "".join(streamed) == answer == language_model(quantized()).invoke(PROMPT)
