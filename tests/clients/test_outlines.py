"""Outlines: what a compiled model may write is constrained as its original's is."""

import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.helpers.chats import PROMPT, chat_tokenizer
from tests.helpers.toy_llama import lossless, original, quantized

outlines = pytest.importorskip("outlines")

OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}
DATE = r"\d{4}-\d{2}-\d{2}"


class Ring(BaseModel):
    bearer: Literal["Bilbo", "Frodo"]
    found: bool


CONSTRAINTS: dict[str, Any] = {
    "a schema": Ring,
    "an expression": outlines.types.Regex(DATE),
    "a choice": Literal["Bilbo", "Frodo"],
}


def written(model: Callable[[], Any], constraint: Any) -> list[str]:
    """A text, and those of a batch."""
    generator = outlines.Generator(outlines.from_transformers(model(), chat_tokenizer()), constraint)
    return [generator(PROMPT, **OPTIONS), *generator.batch([PROMPT, PROMPT[:70]], **OPTIONS)]


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_it_writes_what_it_writes_with_the_original(name: str) -> None:
    assert written(lossless, CONSTRAINTS[name]) == written(original, CONSTRAINTS[name])


def test_a_quantized_model_keeps_to_its_constraint() -> None:
    assert all(Ring.model_validate_json(text) for text in written(quantized, Ring))
    assert all(re.fullmatch(DATE, text) for text in written(quantized, CONSTRAINTS["an expression"]))
