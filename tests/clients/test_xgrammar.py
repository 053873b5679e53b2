"""XGrammar's logits processor: what a compiled model may write is constrained as its original's is."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.helpers.chats import PROMPT, chat_tokenizer
from tests.helpers.toy_llama import lossless, original, quantized

xgrammar = pytest.importorskip("xgrammar")
hf = pytest.importorskip("xgrammar.contrib.hf")

OPTIONS: dict[str, Any] = {"max_new_tokens": 80, "do_sample": False}
DATE = r"\d{4}-\d{2}-\d{2}"


class Ring(BaseModel):
    bearer: Literal["Bilbo", "Frodo"]
    found: bool


@cache
def compiler() -> Any:
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(chat_tokenizer(), vocab_size=128))


GRAMMARS: dict[str, Callable[[], Any]] = {
    "a schema": lambda: compiler().compile_json_schema(Ring, any_whitespace=False),
    "an expression": lambda: compiler().compile_regex(DATE),
}


def written(model: Callable[[], Any], grammar: str, **options: Any) -> list[str]:
    """Behind two prompts, one of them padded."""
    tokenizer = chat_tokenizer()
    given = tokenizer([PROMPT, PROMPT[:70]], return_tensors="pt", padding=True, padding_side="left")
    processor = hf.LogitsProcessor(GRAMMARS[grammar]())
    found = model().generate(**given, logits_processor=[processor], **OPTIONS, **options)
    return tokenizer.batch_decode(found[:, given.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_it_writes_what_it_writes_with_the_original(grammar: str) -> None:
    assert written(lossless, grammar) == written(original, grammar)


def test_a_quantized_model_keeps_to_its_grammar() -> None:
    assert all(Ring.model_validate_json(text) for text in written(quantized, "a schema"))
    assert all(re.fullmatch(DATE, text) for text in written(quantized, "an expression"))
