"""smolagents loads a model by the name of its folder, a compressed one too."""

from pathlib import Path

import pytest

from tests.helpers.chats import PROMPT, chat_tokenizer
from tests.helpers.toy_llama import quantized

smolagents = pytest.importorskip("smolagents")


def test_it_answers_with_a_compressed_folder(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path)
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = smolagents.TransformersModel(model_id=str(tmp_path), device_map="cpu", max_new_tokens=12, do_sample=False)
    answer = loaded([{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]).content
    assert loaded.model.kvmix_plan == quantized().kvmix_plan
    given = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    written = quantized().generate(**given, max_new_tokens=12, do_sample=False)[0, given.input_ids.shape[1] :]
    assert answer == tokenizer.decode(written, skip_special_tokens=True)
