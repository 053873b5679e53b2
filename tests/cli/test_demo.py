"""The demo on a tiny model, and what it promises: that its text, its evaluation and its calibration do not overlap."""

import io

import torch
from rich.console import Console

from kvmix_compile.calibration import build_calibration
from kvmix_compile.cli.demo import FACT, QUESTION, Size, make_prompt, run
from kvmix_compile.evaluate.held_out import held_out_english
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.tiny import tiny


def test_demo_runs_from_top_to_bottom() -> None:
    model, tokenizer = tiny("llama", max_position_embeddings=4096), character_tokenizer()
    console = Console(width=120, record=True, file=io.StringIO())
    run(model, tokenizer, console, Size(passages=2, evaluated_tokens=300, answer_tokens=4))
    text = console.export_text()
    for line in ("verified", "keys", "values", "code bits", "stored bits", "bits per element", "perplexity"):
        assert line in text


def test_fact_lies_where_the_prompt_says() -> None:
    tokenizer = character_tokenizer()
    prompt = make_prompt(tokenizer, ["first passage", "second passage"])
    first, last = prompt.fact
    assert tokenizer.decode(prompt.text[0, first : last + 1]) == FACT
    assert tokenizer.decode(prompt.question[0]) == QUESTION
    assert tokenizer.decode(prompt.text[0]) == f"first passage\n\n{FACT}\n\nsecond passage\n\n"


def test_held_out_text_is_not_calibrated_on() -> None:
    tokenizer = character_tokenizer()
    calibration = build_calibration(tiny("llama"), tokenizer)
    seen = tokenizer.decode(torch.cat(calibration.rows))
    passages = held_out_english()
    assert len(passages) > 15
    assert not any(paragraph in seen for passage in passages for paragraph in passage.split("\n\n"))
