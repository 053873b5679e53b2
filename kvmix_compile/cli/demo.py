"""The demo: SmolLM2 with its KV cache at 2.3 bits. Run `python -m kvmix_compile.cli.demo`.

Every number that it prints is measured while it runs.
"""

import logging
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, TextStreamer
from transformers.utils import logging as transformers_logging

from kvmix_compile.cli.picture import plan_picture
from kvmix_compile.cli.prompts import chat_prompt
from kvmix_compile.cli.tables import CacheSize, compared, megabytes, times
from kvmix_compile.compiler import apply
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.perplexity import perplexity
from kvmix_compile.models_zoo.smollm2 import load_smollm2
from kvmix_compile.passes.capture.signature import cache_name
from kvmix_compile.runtime.cache import KVMixCache

BUDGET = 2.3  # code bits per element: the headline configuration of the KVmix paper
# Within reach of a model of 135M parameters, before and after. Rote detail suffers first at this budget: of a number of
# four digits in the same place the compressed model remembers that there is one, and not which.
FACT = "The best thing to eat in Ljubljana is the honey cake at the bakery of Marta Novak."
QUESTION = "What is the best thing to eat in Ljubljana?"


@dataclass(frozen=True)
class Size:
    """How much the demo does: passages read (some 280 tokens each), tokens evaluated, tokens of the answer."""

    passages: int = 9
    evaluated_tokens: int = 3072
    answer_tokens: int = 32


@dataclass(frozen=True)
class Prompt:
    """A text with a fact in its middle and a question, int64 `[1, tokens]`. `fact`: first and last token of it."""

    text: Tensor
    question: Tensor
    fact: tuple[int, int]


def main() -> None:
    """Run the demo on SmolLM2, quietly but for its own words."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    run(*load_smollm2(), Console(highlight=False), Size())


def run(model: Any, tokenizer: Any, console: Console, size: Size) -> None:
    """Compress `model`, ask it something, and measure what that costs."""
    start = perf_counter()
    console.rule("1. Compress the KV cache")
    compressed: Any = apply(model, budget=BUDGET, tokenizer=tokenizer, progress=True)
    report = compressed.kvmix_report
    console.print(f"{report.model}: {len(report.sites)} attention layers found, each with its KV cache rewritten")
    console.print(f"importance measured on {report.calibration}")
    console.print(f"verified: unquantized, the new graph's logits differ by {report.verified:.0e} standard deviations")
    console.print(times(report))

    console.rule("2. The plan: bits where they matter")
    console.print(plan_picture(compressed.kvmix_plan))

    console.rule("3. A question about a long text")
    passages = held_out_english()
    prompt = make_prompt(tokenizer, passages[-size.passages :])
    describe(prompt, compressed, console)
    console.print("original:   ", end="")
    answer(model, tokenizer, prompt, DynamicCache(), size.answer_tokens)
    cache = KVMixCache(compressed)
    console.print("compressed: ", end="")
    answer(compressed, tokenizer, prompt, cache, size.answer_tokens)

    console.rule("4. What it costs")
    evaluated = token_ids(tokenizer, "\n\n".join(passages[: -size.passages]), size.evaluated_tokens)
    before = perplexity(model, evaluated, progress=True)
    after = perplexity(compressed, evaluated, progress=True)
    console.print(results(compressed, cache, before, after, len(evaluated)))
    console.print(f"The demo took {perf_counter() - start:.0f} s.")


def make_prompt(tokenizer: Any, passages: list[str]) -> Prompt:
    """The passages with FACT between them, and QUESTION at the end, as a chat."""
    half = len(passages) // 2
    earlier, later = "\n\n".join(passages[:half]) + "\n\n", "\n\n" + "\n\n".join(passages[half:]) + "\n\n"
    chat = chat_prompt(tokenizer, earlier + FACT + later + QUESTION)
    opening, rest = chat.split(FACT)
    middle, closing = rest.split(QUESTION)
    before, fact, after, question = (
        tokenizer.encode(part, add_special_tokens=False, verbose=False)
        for part in (opening, FACT, middle, QUESTION + closing)
    )
    return Prompt(
        torch.tensor([before + fact + after]), torch.tensor([question]), (len(before), len(before) + len(fact) - 1)
    )


def describe(prompt: Prompt, compressed: Any, console: Console) -> None:
    """Say what the model will read, and what it will be asked."""
    plan, tokens = compressed.kvmix_plan, prompt.text.shape[1]
    first, last = prompt.fact
    console.print(f"The model reads {tokens} tokens of Python's documentation. One sentence is about something else:")
    console.print(f"[italic]{FACT}[/italic]")
    console.print(
        f"It is at tokens {first} to {last}: past the {plan.sinks} first and before the {plan.recent} last tokens, "
        "which stay unquantized. Only then comes the question, so question and answer have the text from the cache."
    )
    console.print(f"[bold]{QUESTION}[/bold]")


def answer(model: Any, tokenizer: Any, prompt: Prompt, cache: Any, tokens: int) -> None:
    """Read the text into the cache, then the question, and stream the answer to standard output."""
    held = {cache_name(model.forward): cache}
    with torch.no_grad():
        model(input_ids=prompt.text, use_cache=True, logits_to_keep=1, **held)
    ids = torch.cat([prompt.text, prompt.question], dim=1)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=streamer,
        max_new_tokens=tokens,
        do_sample=False,
        **held,
    )


def results(compressed: Any, cache: KVMixCache, before: float, after: float, evaluated: int) -> Table:
    """The table: each number before and after, and what it means."""
    plan, size = compressed.kvmix_plan, CacheSize.of(cache)
    itemsize, kept = cache.format.dtypes[0].itemsize, cache.format.state_dtypes[0].itemsize
    own, sixteen, now = size.unquantized(itemsize), size.unquantized(), size.nbytes
    table = Table("", "original", "compressed", "what it means", show_lines=True)
    table.add_row(
        "cache against 16 bits",
        megabytes(sixteen),
        megabytes(now),
        f"keys and values of {size.tokens} tokens: {compared(now, sixteen)} in 16 bits",
    )
    table.add_row(
        f"cache against {8 * itemsize} bits",
        megabytes(own),
        megabytes(now),
        f"{compared(now, own)} in the dtype that this model really runs in",
    )
    table.add_row("code bits", "16", f"{plan.code_bits:.2f}", "of an element's code, on average: what the budget sets")
    table.add_row("stored bits", "16", f"{plan.storage_bits:.2f}", "with the scales and zero points of its group")
    table.add_row(
        "bits per element",
        str(8 * itemsize),
        f"{cache.bits_per_element:.2f}",
        f"everything: the {plan.sinks} first and up to {plan.recent} last tokens are kept at {8 * kept} bits, and "
        "there is room to grow; falls as the text gets longer",
    )
    table.add_row(
        "perplexity",
        f"{before:.2f}",
        f"{after:.2f}",
        f"of {evaluated} held-out tokens, each predicted from what the cache holds; lower is better",
    )
    return table


if __name__ == "__main__":
    main()
