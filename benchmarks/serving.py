"""The same requests to vLLM without a plan and with one, in the same memory:

    python -m benchmarks.serving FOLDER --plan plan.json [--gigabytes 0.4] [--prompt 500 2000] [--rate 2]

FOLDER holds the model. Requests arrive as a Poisson process, their prompts have the given lengths in turn, and every
other one begins with what all of these have in common. Each contender has a process of its own, one after the other,
with the same seed: without a plan, with it, and with it where chunks are not exact. Where machines are noisy, --runs
takes these in turn several times, and the median of each figure is reported.

Reported of each: the tokens that fit, by vLLM's own count; the most requests at once, and the most tokens that these
had read or written; preemptions; tokens written a second, in all and in steps in which no prompt was read or waited;
the median and the worst of the seconds to a first token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvmix_compile.evaluate.records import circumstances, write_json

CONTENDERS: Mapping[str, Mapping[str, Any]] = {
    "without a plan": {},
    "with a plan": {"exact_chunks": True},
    "with a plan, chunks not exact": {"exact_chunks": False},
}
GIGABYTE = 10**9
SEED = 0
# The share of a prompt that every other request has in common with others.
COMMON = 0.75


@dataclass
class Sent:
    """One request: its prompt, when it arrives, in seconds from the start, and what became of it."""

    prompt: list[int]
    arrival: float
    first_token: float = 0.0
    tokens: int = 0
    is_finished: bool = False


@dataclass
class Found:
    """What one contender did with all requests."""

    contender: str
    tokens_that_fit: int
    most_requests: int = 0
    most_tokens: int = 0
    preemptions: int = 0
    tokens_a_second: float = 0.0
    decoded_a_second: float = 0.0
    median_first_token: float = 0.0
    worst_first_token: float = 0.0
    vllm: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--gigabytes", type=float, default=0.4, help="for keys and values, 10^9 bytes each")
    parser.add_argument("--prompt", type=int, nargs="+", default=[500, 2000], help="tokens of prompts, in turn")
    parser.add_argument("--tokens", type=int, default=64, help="that each request is to write")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second that arrive; 0: all at once")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="as vLLM compiles; else eager")
    parser.add_argument("--output", help="a file for what was found, as JSON")
    parser.add_argument("--contenders", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    parser.add_argument("--runs", type=int, default=1, help="of each contender")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(asdict(measure(options))))
        return
    runs = [[_in_a_process(name) for name in options.contenders] for _ in range(options.runs)]
    rows = [middle(rows) for rows in zip(*runs, strict=True)]
    for row in rows:
        print(_line(row))
    if options.output:
        made = circumstances("benchmarks.serving", torch.device("cpu"))
        write_json(Path(options.output), {**made, "vllm": rows[0]["vllm"], "rows": rows, "runs": runs})


def _in_a_process(contender: str) -> dict[str, Any]:
    """What one found, with the options of this process."""
    command = [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:], "--only", contender]
    # In one process: then the engine does nothing between the steps that are asked of it.
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def middle(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each figure of several runs the median; what is no number is the same in all."""
    figures = {name for name, value in rows[0].items() if isinstance(value, int | float)}
    return {name: median(row[name] for row in rows) if name in figures else rows[0][name] for name in rows[0]}


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['contender']:32} {row['tokens_that_fit']:8} tokens fit, at most {row['most_requests']:3} requests at "
        f"once with {row['most_tokens']:7} tokens, {row['preemptions']:3} preemptions, "
        f"{row['tokens_a_second']:7.2f} tokens/s ({row['decoded_a_second']:.2f} decoding), "
        f"first token {row['median_first_token']:.2f} s, "
        f"at worst {row['worst_first_token']:.2f} s"
    )


def requests(lengths: Sequence[int], count: int, rate: float, vocabulary: int) -> list[Sent]:
    """Those that arrive, in their order."""
    generator = torch.Generator().manual_seed(SEED)

    def text(tokens: int) -> list[int]:
        return torch.randint(min(100, vocabulary // 2), vocabulary, (tokens,), generator=generator).tolist()

    common, arrival, found = text(max(lengths)), 0.0, []
    for number in range(count):
        length = lengths[number // 2 % len(lengths)]
        shared = int(COMMON * length) if number % 2 else 0
        found.append(Sent([*common[:shared], *text(length - shared)], arrival))
        if rate:
            arrival += torch.empty(1).exponential_(rate, generator=generator).item()
    return found


def measure(options: argparse.Namespace) -> Found:
    """Sends all requests to one contender, in this process."""
    import vllm

    chosen = CONTENDERS[options.only]
    llm = vllm.LLM(
        options.folder,
        dtype=options.dtype,
        enforce_eager=not options.compile,
        kv_cache_memory_bytes=int(options.gigabytes * GIGABYTE),
        max_model_len=max(options.prompt) + options.tokens,
        seed=SEED,
        disable_log_stats=False,
        additional_config={"kvmix": {"plan": options.plan, **chosen}} if chosen else {},
    )
    config = llm.llm_engine.vllm_config
    sent = requests(options.prompt, options.requests, options.rate, config.model_config.get_vocab_size())
    found = Found(options.only, config.cache_config.kv_cache_size_tokens, vllm=vllm.__version__)
    begin = time.perf_counter()
    _answer(llm, sent, options.tokens, found)
    seconds = time.perf_counter() - begin
    found.preemptions = int(_metric(llm, "vllm:num_preemptions"))
    found.tokens_a_second = sum(one.tokens for one in sent) / seconds
    waited = [one.first_token - one.arrival for one in sent]
    found.median_first_token, found.worst_first_token = median(waited), max(waited)
    return found


def _answer(llm: Any, sent: Sequence[Sent], tokens: int, found: Found) -> None:
    """Adds each request when it arrives, and lets the engine step until all are answered."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    engine, begin, added, decoded, seconds = llm.llm_engine, time.perf_counter(), 0, 0, 0.0
    while not all(one.is_finished for one in sent):
        now = time.perf_counter() - begin
        while added < len(sent) and sent[added].arrival <= now:
            engine.add_request(str(added), {"prompt_token_ids": sent[added].prompt}, params)
            added += 1
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, sent[added].arrival - now))
            continue
        is_decoding = all(one.tokens for one in sent[:added])
        written, started = sum(one.tokens for one in sent), time.perf_counter()
        for output in engine.step():
            one = sent[int(output.request_id)]
            one.first_token = one.first_token or time.perf_counter() - begin
            one.tokens, one.is_finished = len(output.outputs[0].token_ids), output.finished
        if is_decoding:
            decoded += sum(one.tokens for one in sent) - written
            seconds += time.perf_counter() - started
        running = [len(one.prompt) + one.tokens for one in sent if one.tokens and not one.is_finished]
        found.most_tokens = max(found.most_tokens, sum(running))
        found.most_requests = max(found.most_requests, int(_metric(llm, "vllm:num_requests_running")))
    found.decoded_a_second = decoded / seconds if seconds else 0.0


def _metric(llm: Any, name: str) -> float:
    """The sum of what vLLM counts by this name."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


if __name__ == "__main__":
    main()
