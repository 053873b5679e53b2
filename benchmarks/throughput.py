"""Tokens a second at equal memory: `python -m benchmarks.throughput [--gigabytes 1] [--context 500 1000 4000]`.

Each cache may take so many bytes. Of each the largest batch is found that fits with a prompt and what is generated,
and that batch decodes: with transformers' DynamicCache, StaticCache and QuantizedCache (4 bits by quanto, where it is
installed), and the model compiled to a budget. All rows have the same prompt, read once. Caches take turns in rounds of
a few steps, so that whatever else the machine does meets each alike; ratios are to the DynamicCache of those rounds.

Models and devices are those of benchmarks.decode.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import kvmix_compile
from benchmarks.decode import (
    CALIBRATION_TOKENS,
    DEVICE,
    add_model_options,
    attempt,
    available,
    configurations,
    left_out_rows,
    load,
    output,
)
from benchmarks.memory import read
from kvmix_compile.evaluate.baselines import packages
from kvmix_compile.evaluate.configurations import Compiled, Configuration
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.passes.capture.signature import cache_name

GIGABYTE = 10**9
BASELINES = ("quanto-4",)
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Prompt:
    """A prompt, int64 `[1, tokens]`, with its keys and values `[1, heads, tokens, head_dim]` of each layer, as the
    original computes them.
    """

    ids: Tensor
    states: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def read(cls, model: Any, ids: Tensor) -> "Prompt":
        cache = DynamicCache()
        read(model, ids, cache)
        return cls(ids, [(layer.keys, layer.values) for layer in cache.layers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="for keys and values, 10^9 bytes each")
    parser.add_argument("--context", type=int, nargs="+", default=[500, 1000, 4000])
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="tokens that each row generates in a round")
    options = parser.parse_args()
    model, ids = load(options)
    compiled = kvmix_compile.apply(model, budget=options.budget, calibration=ids[:CALIBRATION_TOKENS])
    missing: dict[str, str] = {}
    baselines = available(BASELINES, model, missing)
    rows, left_out = [], left_out_rows(None, missing)
    for context in options.context:
        prompt = Prompt.read(model, ids[None, :context].to(DEVICE))
        room = context + generated_tokens(options.rounds, options.steps)
        contenders = [*configurations(model, room, baselines), Compiled("kvmix", compiled)]
        found, reasons = measure(contenders, prompt, options.gigabytes * GIGABYTE, options.rounds, options.steps)
        rows += found
        left_out += left_out_rows(context, reasons)
    record = {"model": options.model, "dtype": options.dtype, "weights": options.weights}
    record |= {"budget": options.budget, "gigabytes": options.gigabytes}
    record |= {"rounds": options.rounds, "steps_a_round": options.steps, "results": rows, "left_out": left_out}
    write_json(output(options, "throughput"), record | circumstances("throughput", DEVICE, packages(baselines)))


@torch.no_grad()
def measure(
    contenders: Sequence[Configuration], prompt: Prompt, limit: float, rounds: int, steps: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Of each configuration its batch and its tokens a second; and why some are left out, by name.

    limit: bytes of a cache that has room for the prompt and for what is generated after it.
    """
    reasons: dict[str, str] = {}
    decoders, generated = {}, generated_tokens(rounds, steps)
    for contender in contenders:
        decoder = attempt(contender.name, partial(Decoder, contender, prompt, limit, generated), reasons)
        if decoder:
            decoders[contender.name] = decoder
    for number in range(rounds + 1):
        for name in list(decoders):
            count = steps if number else WARM_UP_STEPS
            attempt(name, partial(decoders[name].decode, count, timed=bool(number)), reasons)
            if name in reasons:
                del decoders[name]
    return [decoder.row(decoders.get("dynamic"), prompt.ids.shape[1]) for decoder in decoders.values()], reasons


def generated_tokens(rounds: int, steps: int) -> int:
    """That each row generates in all."""
    return WARM_UP_STEPS + rounds * steps


class Decoder:
    """As many rows of one prompt as fit, and what their steps took."""

    def __init__(self, configuration: Configuration, prompt: Prompt, limit: float, generated: int) -> None:
        self.name, self.model = configuration.name, configuration.model
        self.row_bytes = tensor_bytes(self._filled(configuration, prompt, 1, generated))
        self.batch = int(limit // self.row_bytes)
        if not self.batch:
            raise ValueError(f"one row takes {self.row_bytes} bytes")
        self.cache = self._filled(configuration, prompt, self.batch, 0)
        self.next_token = prompt.ids[:, -1:].expand(self.batch, 1)
        self.seconds: list[float] = []

    def _filled(self, configuration: Configuration, prompt: Prompt, batch: int, more: int) -> Any:
        """A cache that holds the prompt `batch` times, and after it its first `more` tokens."""
        cache = configuration.new_cache()
        if isinstance(configuration, Compiled):
            read(self.model, prompt.ids, cache)
            if more:
                read(self.model, prompt.ids[:, :more], cache)
            cache.batch_repeat_interleave(batch)
            return cache
        for layer, (keys, values) in enumerate(prompt.states):
            for some in (slice(None), slice(more))[: 2 if more else 1]:
                cache.update(*(x[:, :, some].expand(batch, -1, -1, -1).contiguous() for x in (keys, values)), layer)
        return cache

    def decode(self, steps: int, timed: bool) -> None:
        for _ in range(steps):
            begin = perf_counter()
            held = {cache_name(self.model.forward): self.cache}
            output = self.model(input_ids=self.next_token, use_cache=True, logits_to_keep=1, **held)
            self.next_token = output.logits[:, -1:].argmax(-1)
            self.next_token.tolist()  # waits for the device
            if timed:
                self.seconds.append(perf_counter() - begin)

    @property
    def tokens_per_second(self) -> float:
        return self.batch / median(self.seconds)

    def row(self, dynamic: "Decoder | None", context: int) -> dict[str, Any]:
        found = {
            "context": context,
            "cache": self.name,
            "batch": self.batch,
            "bytes_a_row": self.row_bytes,
            "median_seconds": median(self.seconds),
            "tokens_per_second": self.tokens_per_second,
        }
        if dynamic:
            found["ratio_to_dynamic"] = self.tokens_per_second / dynamic.tokens_per_second
        print(json.dumps(found), flush=True)
        return found


def tensor_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(cache)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if hasattr(value, "__tensor_flatten__"):
        # A wrapper, whose own storage is empty.
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, kvmix_compile.KVMixCache):
        yield from value.tensors()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "layers") or type(value).__module__ == "transformers.cache_utils":
        for item in vars(value).values():
            yield from _tensors(item)


if __name__ == "__main__":
    main()
