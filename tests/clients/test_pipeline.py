"""transformers' pipeline and streamers: on a compressed cache as on the model's own."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from transformers import Pipeline, PreTrainedModel, TextIteratorStreamer, pipeline

from tests.helpers.chats import PROMPT, chat_tokenizer
from tests.helpers.toy_llama import lossless, original, quantized

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
CHAT = [{"role": "user", "content": PROMPT}]
OTHER = [{"role": "system", "content": "Speak. "}, {"role": "user", "content": PROMPT}]

WAYS: dict[str, Callable[[Pipeline], Any]] = {
    "a text": lambda pipe: pipe(PROMPT, **GREEDY),
    "a batch": lambda pipe: pipe([PROMPT, PROMPT[:70], "One"], batch_size=3, **GREEDY),
    "a chat": lambda pipe: pipe(CHAT, **GREEDY),
    "a batch of chats": lambda pipe: pipe([CHAT, OTHER], batch_size=2, **GREEDY),
    "several beams": lambda pipe: pipe(PROMPT, num_beams=3, num_return_sequences=2, **GREEDY),
    "a lookup": lambda pipe: pipe(PROMPT, prompt_lookup_num_tokens=4, **GREEDY),
    "until a word": lambda pipe: pipe(PROMPT, stop_strings=["a", "e"], tokenizer=chat_tokenizer(), **GREEDY),
}


def pipe_of(model: PreTrainedModel) -> Pipeline:
    return pipeline("text-generation", model=model, tokenizer=chat_tokenizer())


@pytest.mark.parametrize("way", WAYS)
def test_a_pipeline_writes_what_it_writes_with_the_original(way: str) -> None:
    assert WAYS[way](pipe_of(lossless())) == WAYS[way](pipe_of(original()))


def test_an_answer_is_streamed_from_another_thread() -> None:
    tokenizer = chat_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    given = {**tokenizer(PROMPT, return_tensors="pt"), "streamer": streamer, **GREEDY}
    thread = Thread(target=quantized().generate, kwargs=given)
    thread.start()
    parts = list(streamer)
    thread.join()
    (answer,) = pipe_of(quantized())(PROMPT, return_full_text=False, **GREEDY)
    assert "".join(parts) == answer["generated_text"] and len(parts) >= 12


def test_threads_each_write_their_own_text() -> None:
    pipe, prompts = pipe_of(quantized()), [PROMPT, PROMPT[5:], PROMPT[9:]]
    expected = [pipe(prompt, **GREEDY) for prompt in prompts]
    found: dict[int, Any] = {}
    threads = [
        Thread(target=lambda row, prompt: found.update({row: pipe(prompt, **GREEDY)}), args=asked)
        for asked in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(row) for row in range(3)] == expected


def test_a_folder_is_all_that_it_needs(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path))
    assert pipe.model.kvmix_plan == quantized().kvmix_plan
    assert pipe(PROMPT, **GREEDY) == pipe_of(quantized())(PROMPT, **GREEDY)
