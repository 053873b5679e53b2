"""SmolLM2 at 2.3 bits, served to OpenAI's clients by vLLM: its text is that of `generate`."""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import kvmix_compile
from kvmix_compile import KVMixCache
from tests.serving.server import Server, serving

TOKENS = 40
# Where two tokens are as close as this, a difference of rounding decides which of them is written. In a long prompt it
# turns so many codes that more is needed: twice what the compiled model itself gives otherwise where the text comes in
# chunks of so many tokens, which multiplies matrices of other shapes.
TIE = 0.05
OTHER_CUTS = 100
# CPython's own English.
TEXT = " ".join(topics.values())[:40_000]
# Of 96 tokens packed, or of 8 unquantized ones. A request of 760 tokens takes 33, and one more before it is done; the
# longest takes 61 while its prompt is read.
BLOCKS = 67


@pytest.fixture(scope="module")
def model() -> Any:
    from kvmix_compile.models_zoo.smollm2 import load_smollm2

    try:
        return load_smollm2()
    except ImportError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    original, tokenizer = model
    return kvmix_compile.apply(original, budget=2.3, tokenizer=tokenizer, exact_chunks=True)


@pytest.fixture(scope="module")
def ids(model: Any) -> list[int]:
    return model[1](TEXT)["input_ids"]


@pytest.fixture(scope="module")
def folder(model: Any, twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and its plan."""
    folder = tmp_path_factory.mktemp("smollm2")
    for part in model:
        part.save_pretrained(folder)
    twin.kvmix_plan.save(folder / "plan.json")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """With pages for two requests of 700 tokens and a little more, and prompts cut into chunks."""
    options = {"max-num-batched-tokens": 418, "num-gpu-blocks-override": BLOCKS, "max-model-len": 1024}
    with serving(folder, folder / "log.txt", folder / "plan.json", **options) as started:
        yield started


def written(server: Server, prompt: list[int]) -> list[int]:
    found = server.completion(prompt, max_tokens=TOKENS, ignore_eos=True, return_token_ids=True)
    return found["choices"][0]["token_ids"]


@torch.no_grad()
def read(twin: Any, text: list[int], cuts: Iterable[int] = ()) -> torch.Tensor:
    """The compiled model's logits at every token of a text that comes in such chunks."""
    past, ends = KVMixCache(twin), [0, *cuts, len(text)]
    chunks = [torch.tensor([text[first:end]]) for first, end in pairwise(ends)]
    return torch.cat([twin(chunk, past_key_values=past).logits[0] for chunk in chunks])


def agrees(twin: Any, prompt: list[int], found: list[int]) -> bool:
    """Whether each token is what the compiled model would write next, or as good as that, as far as it is sure."""
    text, at = [*prompt, *found], slice(len(prompt) - 1, -1)
    logits, otherwise_cut = read(twin, text)[at], read(twin, text, range(OTHER_CUTS, len(text), OTHER_CUTS))[at]
    rounding = (logits.log_softmax(-1) - otherwise_cut.log_softmax(-1)).gather(1, logits.topk(2).indices).abs().max()
    below_best = logits.max(-1).values - logits.gather(1, torch.tensor(found)[:, None])[:, 0]
    return bool((below_best <= max(TIE, 2 * rounding)).all())


def test_its_text_is_what_generate_writes(twin: Any, ids: list[int], server: Server) -> None:
    prompt = ids[:300]
    generated = twin.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :].tolist()
    assert agrees(twin, prompt, generated)
    found = written(server, prompt)
    assert agrees(twin, prompt, found) and len(found) == TOKENS


def test_prompts_in_chunks_and_prompts_that_are_cached(twin: Any, ids: list[int], server: Server) -> None:
    prompt = ids[1000:1700]
    first, hits = written(server, prompt), server.metric("vllm:prefix_cache_hits_total")
    again = written(server, prompt)
    assert server.metric("vllm:prefix_cache_hits_total") > hits
    assert agrees(twin, prompt, first) and again == first


def test_requests_that_give_way_to_others(twin: Any, ids: list[int], server: Server) -> None:
    prompts = [ids[start : start + 760] for start in (0, 2000, 3000, 4000)]
    before = server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(prompts)) as clients:
        found = list(clients.map(lambda prompt: written(server, prompt), prompts))
    assert all(agrees(twin, prompt, tokens) for prompt, tokens in zip(prompts, found, strict=True))
    assert server.metric("vllm:num_preemptions_total") > before


def test_perplexity_through_its_cache(twin: Any, ids: list[int], server: Server) -> None:
    window = 1000
    answer = server.completion(ids[:window], max_tokens=1, prompt_logprobs=0)["choices"][0]["prompt_logprobs"]
    said = [step[str(token)]["logprob"] for step, token in zip(answer[1:], ids[1:window], strict=True)]
    own = kvmix_compile.perplexity(twin, torch.tensor(ids[:window]), window=window)
    assert abs(math.exp(-sum(said) / len(said)) - own) < 0.05


def test_what_is_held_is_said_at_the_start(folder: Path, server: Server) -> None:
    log = (folder / "log.txt").read_text()
    assert "unquantized pages" in log and "packed pages" in log and "times as many" in log
