"""Tokens a second when a whole model decodes: `python -m benchmarks.decode [--context 1000 7000] [--dtype float32]`.

A model reads a prompt and continues it token by token, on a CUDA device if there is one, else on the CPU: the original
model with transformers' DynamicCache, StaticCache (compiled where there is a GPU) and QuantizedCache (of those back
ends that are installed), and the model compiled to a budget with its KVMixCache, as it is and with `compile=True`. All
of them take turns in rounds of a few tokens, so that whatever else the machine does meets each alike; ratios are to the
DynamicCache of the same rounds.

The model is SmolLM2, on CUDA devices one of random weights as large as Llama 3.1 8B: what it says matters to nobody
here, and its weights need not be had.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import kvmix_compile
from kvmix_compile.baselines import QUANTIZED, Quantized, check_baselines, packages
from kvmix_compile.configurations import Compiled, Configuration
from kvmix_compile.errors import InputError
from kvmix_compile.held_out import held_out_english, token_ids
from kvmix_compile.models_zoo.smollm2 import load_smollm2
from kvmix_compile.records import circumstances

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = Path(__file__).parent / "results" / f"decode-{DEVICE.type}.json"
BASELINES = ("quanto-4", "hqq-2")
MODELS = ("smollm2", "random")
VOCABULARY = 32000  # of the random model: fewer embeddings than Llama's, which decoding does not read
# Enough to choose bits by, which is not what is measured here.
CALIBRATION_TOKENS = 512
# Compiling, allocating and a first block to pack, which come once, are over after so many tokens.
WARM_UP_TOKENS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Static(Configuration):
    """A transformers model with a StaticCache."""

    tokens: int

    def new_cache(self) -> StaticCache:
        return StaticCache(config=self.model.config, max_cache_len=self.tokens)


class Decoder:
    """A model that has read a prompt, and what its steps took."""

    def __init__(self, configuration: Configuration, prompt: Tensor) -> None:
        self.name, self.model, self.cache = configuration.name, configuration.model, configuration.new_cache()
        self.forward = self.model.forward
        # A prompt is as good as free to read with any cache, and its logits are the same: the first token is.
        self.next_token = self._step(prompt)
        if isinstance(configuration, Static) and DEVICE.type == "cuda":
            self.forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)
        self.seconds: list[float] = []

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of so many steps, the choice of the next token included."""
        took = []
        for _ in range(tokens):
            begin = perf_counter()
            self.next_token = self._step(self.next_token)
            self.next_token.tolist()  # waits for the device
            took.append(perf_counter() - begin)
        return took

    def _step(self, ids: Tensor) -> Tensor:
        output = self.forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="random" if DEVICE.type == "cuda" else "smollm2")
    parser.add_argument("--layers", type=int, default=32, help="of the random model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--context", type=int, nargs="+", default=[1000, 7000] if DEVICE.type == "cpu" else [4096, 32768]
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32" if DEVICE.type == "cpu" else "bfloat16")
    parser.add_argument("--budget", type=float, default=2.3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, ids = load(options.model, DTYPES[options.dtype], options.layers, max(options.context))
    compiled = kvmix_compile.apply(model, budget=options.budget, calibration=ids[:CALIBRATION_TOKENS])
    by_inductor = kvmix_compile.apply(model, plan=compiled.kvmix_plan, verify=False, compile=True)
    baselines = [name for name in BASELINES if _is_available(name, model)]
    rows = []
    for context in options.context:
        prompt = ids[:context].expand(options.batch, -1).to(DEVICE)
        steps = WARM_UP_TOKENS + options.rounds * options.tokens
        contenders = [
            *configurations(model, context + steps, baselines),
            Compiled("kvmix", compiled),
            Compiled("kvmix-compiled", by_inductor),
        ]
        rows += measure(contenders, prompt, options.rounds, options.tokens)
    record = {
        "model": options.model,
        "batch": options.batch,
        "dtype": options.dtype,
        "budget": options.budget,
        "plan_code_bits": compiled.kvmix_plan.code_bits,
        "seconds_to_compile": by_inductor.kvmix_report.seconds["compile"],
    }
    record |= {"rounds": options.rounds, "tokens_a_round": options.tokens, "results": rows}
    options.output.parent.mkdir(exist_ok=True)
    record |= circumstances("decode", DEVICE, packages(baselines))
    options.output.write_text(json.dumps(record, indent=2) + "\n")


def load(name: str, dtype: torch.dtype, layers: int, tokens: int) -> tuple[Any, Tensor]:
    """A model on DEVICE and so many token ids for it."""
    if name == "smollm2":
        model, tokenizer = load_smollm2(dtype)
        return model.to(DEVICE), token_ids(tokenizer, "\n\n".join(held_out_english()), tokens)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    )  # fmt: skip
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model, torch.randint(VOCABULARY, (tokens,))


def configurations(model: Any, tokens: int, baselines: Iterable[str]) -> Iterator[Configuration]:
    yield Configuration("dynamic", model)
    yield Static("static", model, tokens)
    for name in baselines:
        yield Quantized(name, model, *QUANTIZED[name])


@torch.no_grad()
def measure(contenders: list[Configuration], prompt: Tensor, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Of each configuration the median seconds of a step, and tokens a second."""
    decoders = [Decoder(contender, prompt) for contender in contenders]
    for decoder in decoders:
        decoder.decode(WARM_UP_TOKENS)
    ratios: dict[str, list[float]] = {decoder.name: [] for decoder in decoders}
    for _ in range(rounds):
        took = {decoder.name: decoder.decode(tokens) for decoder in decoders}
        for decoder in decoders:
            decoder.seconds += took[decoder.name]
            ratios[decoder.name].append(sum(took["dynamic"]) / sum(took[decoder.name]))
    rows = []
    for decoder in decoders:
        step = median(decoder.seconds)
        row = {
            "context": prompt.shape[1],
            "cache": decoder.name,
            "tokens_per_second": 1 / step,
            "median_seconds": step,
            "fastest_seconds": min(decoder.seconds),
            "speedup_over_dynamic": median(ratios[decoder.name]),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _is_available(name: str, model: Any) -> bool:
    try:
        check_baselines([name], model)
    except InputError as error:
        print(error)
        return False
    return True


if __name__ == "__main__":
    main()
