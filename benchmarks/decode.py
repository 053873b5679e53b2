"""Tokens a second when a whole model decodes: `python -m benchmarks.decode [--context 1000 7000] [--dtype float32]`.

A model reads a prompt and continues it token by token, on a CUDA device if there is one, else on the CPU. The original
model does so with transformers' DynamicCache, StaticCache (as it is, and with its steps compiled by torch.compile) and
QuantizedCache (of those back ends that are installed); the model compiled to a budget with its KVMixCache, as it is and
with `compile=True`. All of them take turns in rounds of a few tokens, so that whatever else the machine does meets each
alike. Ratios are to the DynamicCache of the same rounds, and to the fastest cache of the original model. One that
fails, in memory or otherwise, is left out, and the reason printed and stored; without the DynamicCache its context is.

Products with the weights take most of a step, and no cache makes them faster. `--weights int8` has torchao store the
weights of all of them in 8 bits, one scale a row, and `--dtype bfloat16` computes in 16: then attention is more of it.
Uncompiled, torchao converts all weights at each step, so that what is compiled is to be compared with each other.

The model is SmolLM2, on CUDA devices one of random weights as large as Llama 3.1 8B: what it says matters to nobody
here, and its weights need not be had.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import kvmix_compile
from benchmarks.errors import one_line
from kvmix_compile.errors import InputError
from kvmix_compile.evaluate.baselines import QUANTIZED, Quantized, check_baselines, packages
from kvmix_compile.evaluate.configurations import Compiled, Configuration
from kvmix_compile.evaluate.held_out import held_out_english, token_ids
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.models_zoo.smollm2 import load_smollm2
from kvmix_compile.passes.capture.signature import cache_name

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = Path(__file__).parent / "results"
BASELINES = ("quanto-4", "hqq-2")
MODELS = ("smollm2", "random")
VOCABULARY = 32000  # of the random model: fewer embeddings than Llama's, which decoding does not read
# Enough to choose bits by, which is not what is measured here.
CALIBRATION_TOKENS = 512
# Compiling, allocating and a first block to pack, which come once, are over after so many tokens.
WARM_UP_TOKENS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPE = "float32" if DEVICE.type == "cpu" else "bfloat16"
TORCHAO = "torchao"
WEIGHTS = ("unquantized", "int8")
# As transformers' documentation has a StaticCache's steps compiled; CUDA graphs where there is a GPU.
COMPILE_MODE = {"cpu": "default", "cuda": "reduce-overhead"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Static(Configuration):
    """A transformers model with a StaticCache.

    tokens: that it has room for. compiled: by torch.compile, for its steps.
    """

    tokens: int
    compiled: bool = False

    def new_cache(self) -> StaticCache:
        return StaticCache(config=self.model.config, max_cache_len=self.tokens)


class Decoder:
    """A model that has read a prompt, and what its steps took."""

    def __init__(self, configuration: Configuration, prompt: Tensor) -> None:
        self.name, self.model = configuration.name, configuration.model
        self.forward, self.held = self.model.forward, {cache_name(self.model.forward): configuration.new_cache()}
        # A prompt is as good as free to read with any cache, and its logits are the same: the first token is.
        self.next_token = self._step(prompt)
        if isinstance(configuration, Static) and configuration.compiled:
            self.forward = torch.compile(self.model.forward, mode=COMPILE_MODE[DEVICE.type], fullgraph=True)
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
        output = self.forward(input_ids=ids, use_cache=True, logits_to_keep=1, **self.held)
        return output.logits[:, -1:].argmax(-1).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--context", type=int, nargs="+", default=[1000, 7000] if DEVICE.type == "cpu" else [4096, 32768]
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each round")
    options = parser.parse_args()
    model, ids = load(options)
    compiled = kvmix_compile.apply(model, budget=options.budget, calibration=ids[:CALIBRATION_TOKENS])
    missing: dict[str, str] = {}
    by_inductor = attempt(
        "kvmix-compiled",
        lambda: kvmix_compile.apply(model, plan=compiled.kvmix_plan, verify=False, compile=True),
        missing,
    )
    baselines = available(BASELINES, model, missing)
    rows, left_out = [], left_out_rows(None, missing)
    for context in options.context:
        prompt = ids[:context].expand(options.batch, -1).to(DEVICE)
        steps = WARM_UP_TOKENS + options.rounds * options.tokens
        contenders = [
            *configurations(model, context + steps, baselines),
            Static("static-compiled", model, context + steps, compiled=True),
            Compiled("kvmix", compiled),
        ]
        if by_inductor:
            contenders.append(Compiled("kvmix-compiled", by_inductor))
        measured, reasons = measure(contenders, prompt, options.rounds, options.tokens)
        rows += measured
        left_out += left_out_rows(context, reasons)
    record = {
        "model": options.model,
        "batch": options.batch,
        "dtype": options.dtype,
        "weights": options.weights,
        "budget": options.budget,
        "plan_code_bits": compiled.kvmix_plan.code_bits,
        "seconds_to_compile": by_inductor and by_inductor.kvmix_report.seconds["compile"],
    }
    record |= {"rounds": options.rounds, "tokens_a_round": options.tokens, "results": rows, "left_out": left_out}
    used = packages(baselines) + [TORCHAO] * (options.weights == "int8")
    write_json(output(options, "decode"), record | circumstances("decode", DEVICE, used))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, in which dtype, with which weights, the budget that it is compiled to, and where results go."""
    parser.add_argument("--model", choices=MODELS, default="random" if DEVICE.type == "cuda" else "smollm2")
    parser.add_argument("--layers", type=int, default=32, help="of the random model")
    parser.add_argument("--dtype", choices=DTYPES, default=DEFAULT_DTYPE)
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="int8: by torchao, which must be there")
    parser.add_argument("--budget", type=float, default=2.3)
    parser.add_argument(
        "--output", type=Path, help="results/NAME-DEVICE.json, with what is not the default in its name"
    )


def output(options: argparse.Namespace, name: str) -> Path:
    """The file for results of a benchmark of this name."""
    others = [options.dtype] * (options.dtype != DEFAULT_DTYPE) + [options.weights] * (options.weights != WEIGHTS[0])
    return options.output or RESULTS / f"{'-'.join([name, DEVICE.type, *others])}.json"


def available(names: Sequence[str], model: Any, reasons: dict[str, str]) -> list[str]:
    """Those baselines that can be had; why the others cannot, in `reasons`."""
    for name in names:
        attempt(name, partial(check_baselines, [name], model), reasons)
    return [name for name in names if name not in reasons]


def load(options: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model of add_model_options on DEVICE, and as many token ids for it as the longest context has."""
    model, ids = load_unquantized(options.model, DTYPES[options.dtype], options.layers, max(options.context))
    if options.weights == "int8":
        quantize_weights(model)
    return model, ids


def load_unquantized(name: str, dtype: torch.dtype, layers: int, tokens: int) -> tuple[Any, Tensor]:
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


def quantize_weights(model: torch.nn.Module) -> None:
    """Weights of linear layers in 8 bits, symmetric, a scale for each row, in place; activations stay as they are."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(
            f"--weights int8 needs {TORCHAO}, which is not installed. Run: pip install -e '.[benchmarks]'"
        ) from error
    quantize_(model, Int8WeightOnlyConfig())


def configurations(model: Any, tokens: int, baselines: Iterable[str]) -> Iterator[Configuration]:
    yield Configuration("dynamic", model)
    yield Static("static", model, tokens)
    for name in baselines:
        yield Quantized(name, model, *QUANTIZED[name])


@torch.no_grad()
def measure(
    contenders: list[Configuration], prompt: Tensor, rounds: int, tokens: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Of each configuration the median seconds of a step, and tokens a second; and why some are left out, by name."""
    reasons: dict[str, str] = {}
    decoders: dict[str, Decoder] = {}
    rounds_took: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        decoder = attempt(contender.name, partial(_warm_decoder, contender, prompt), reasons)
        if "dynamic" in reasons:
            return [], _without_dynamic(contenders, reasons)
        if decoder:
            decoders[contender.name] = decoder
    for _ in range(rounds):
        took = {name: attempt(name, partial(decoder.decode, tokens), reasons) for name, decoder in decoders.items()}
        if "dynamic" in reasons:
            return [], _without_dynamic(contenders, reasons)
        for name in reasons.keys() & decoders.keys():
            del decoders[name]
        for name, decoder in decoders.items():
            decoder.seconds += took[name]
            rounds_took[name].append(sum(took[name]))
    originals = [each.name for each in contenders if each.name in decoders and not isinstance(each, Compiled)]
    fastest = min(originals, key=lambda name: median(rounds_took[name]))
    return [_row(decoder, rounds_took, fastest, prompt.shape[1]) for decoder in decoders.values()], reasons


def attempt(name: str, action: Callable[[], Result], reasons: dict[str, str]) -> Result | None:
    """What `action` returns; where it fails None, and why in `reasons`: a contender may fail in any way of its own."""
    try:
        return action()
    except Exception as error:
        reasons[name] = one_line(error)
        return None


def _warm_decoder(configuration: Configuration, prompt: Tensor) -> Decoder:
    decoder = Decoder(configuration, prompt)
    decoder.decode(WARM_UP_TOKENS)
    return decoder


def _row(decoder: Decoder, rounds_took: dict[str, list[float]], fastest: str, context: int) -> dict[str, Any]:
    """fastest: of the caches of the original model."""
    step = median(decoder.seconds)

    def speedup_over(name: str) -> float:
        own = rounds_took[decoder.name]
        return median(others / mine for others, mine in zip(rounds_took[name], own, strict=True))

    row = {
        "context": context,
        "cache": decoder.name,
        "tokens_per_second": 1 / step,
        "median_seconds": step,
        "fastest_seconds": min(decoder.seconds),
        "speedup_over_dynamic": speedup_over("dynamic"),
        "speedup_over_fastest": speedup_over(fastest),
        "fastest_original": fastest,
    }
    print(json.dumps(row), flush=True)
    return row


def _without_dynamic(contenders: list[Configuration], reasons: dict[str, str]) -> dict[str, str]:
    """Reasons for all contenders."""
    missing = f"nothing to compare with, dynamic failed ({reasons['dynamic']})"
    return {contender.name: missing for contender in contenders} | reasons


def left_out_rows(context: int | None, reasons: dict[str, str]) -> list[dict[str, Any]]:
    """As they are stored; no context: at all of them."""
    rows = [{"context": context, "cache": name, "left_out": reason} for name, reason in reasons.items()]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    main()
