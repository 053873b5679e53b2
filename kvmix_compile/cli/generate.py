"""`kvmix generate`: what a model writes with a compressed cache."""

from functools import partial
from pathlib import Path
from time import perf_counter

from rich.console import Console

from kvmix_compile.cli.loading import load_model, read_text
from kvmix_compile.cli.measuring import compressed
from kvmix_compile.cli.output import Stream, console_beside, write_json
from kvmix_compile.cli.prompts import chat_prompt
from kvmix_compile.cli.tables import CacheSize
from kvmix_compile.config import Config
from kvmix_compile.errors import InputError
from kvmix_compile.runtime.cache import KVMixCache


def generate(
    name: str,
    prompt: str | None,
    prompt_file: Path | None,
    plan: Path | None,
    budget: float | None,
    storage_budget: float | None,
    max_new_tokens: int,
    chat: bool,
    json_file: Path | None,
) -> None:
    """Stream an answer, then say what its cache occupies."""
    text = prompt if prompt is not None else read_text(Path(str(prompt_file)))
    if not text.strip():
        raise InputError(f"the prompt in {prompt_file} is empty: give a text to go on from")
    asked = Config(plan=plan, budget=budget, storage_budget=storage_budget)
    asked.checked()
    loaded = load_model(name)
    tokenizer = loaded.require_tokenizer()
    wrapped = chat and bool(tokenizer.chat_template)  # a template writes its own special tokens
    text = chat_prompt(tokenizer, text) if wrapped else text
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not wrapped)["input_ids"]
    model = compressed(loaded, asked)
    ids = ids.to(model.kvmix_program.device)
    cache = KVMixCache(model)
    console = console_beside(json_file)
    start = perf_counter()
    stream = Stream(tokenizer, partial(print, end="", flush=True, file=console.file))
    whole = model.generate(ids, cache=cache, streamer=stream, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = perf_counter() - start
    console.print()
    Console(stderr=True).print(str(CacheSize.of(cache)), soft_wrap=True, highlight=False)
    written = whole[0, ids.shape[1] :]
    write_json(
        json_file,
        {
            "text": tokenizer.decode(written, skip_special_tokens=True),
            "prompt_tokens": ids.shape[1],
            "tokens": len(written),
            "cache_bytes": cache.nbytes,
            "bits_per_element": cache.bits_per_element,
            "seconds": seconds,
        },
    )
