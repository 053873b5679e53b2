"""A tiny model as a server finds it, in a folder with a plan beside it, and what the compiled model says of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import kvmix_compile
from kvmix_compile.models_zoo.tiny import tiny

OPTIONS: dict[str, Any] = {"budget": 2.3, "sinks": 4, "recent": 32}

# The largest difference of a logarithm of a probability where a difference of rounding changes codes of a cache in 2
# bits: what other cuts of the same prompt make in the compiled model itself.
ROUNDING = 0.05


def ids(count: int, seed: int = 1) -> list[int]:
    """A text."""
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Toy:
    """A model, in a folder, with a plan."""

    name: str
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> PreTrainedModel:
        return tiny(self.name, **self.settings)

    @cached_property
    def twin(self) -> Any:
        rows = torch.tensor([ids(128, seed) for seed in range(4)])
        return kvmix_compile.apply(self.model, calibration=rows, exact_chunks=True, **OPTIONS)

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    def save(self) -> Toy:
        self.model.save_pretrained(self.folder)
        self.twin.kvmix_plan.save(self.plan)
        return self

    def adapted(self) -> Path:
        """An adapter of its queries and values, beside it; its model has it merged from now on."""
        folder, tensors = self.folder / "adapter", {}
        generator = torch.Generator().manual_seed(3)
        for number, layer in enumerate(self.model.model.layers):
            for name in ("q_proj", "v_proj"):
                weight = getattr(layer.self_attn, name).weight
                down, up = (
                    torch.randn(shape, generator=generator) for shape in ((8, weight.shape[1]), (weight.shape[0], 8))
                )
                up *= 0.02
                where = f"base_model.model.model.layers.{number}.self_attn.{name}"
                tensors |= {f"{where}.lora_A.weight": down, f"{where}.lora_B.weight": up}
                weight.data += up @ down
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder

    def log_probabilities(self, text: list[int], twin: Any = None) -> Tensor:
        """Of each token of a text but the first, as the compiled model reads them one by one."""
        with torch.no_grad():
            logits = (twin or self.twin)(torch.tensor([text])).logits[0]
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(text)[1:, None])[:, 0]


@contextmanager
def engine(toy: Toy, **options: Any) -> Iterator[Any]:
    """vLLM with the toy and its plan; gone at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    common: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 8_000_000,
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "additional_config": {"kvmix": {"plan": str(toy.plan)}},
    }
    try:
        yield LLM(str(toy.folder), **common | options)
    finally:
        cleanup_dist_env_and_memory()


def written(llm: Any, texts: list[list[int]], tokens: int = 20, **options: Any) -> list[Any]:
    """What it gives for each text."""
    from vllm import SamplingParams

    request = {key: options.pop(key) for key in ("lora_request",) if key in options}
    params = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False, "logprobs": 0} | options
    return llm.generate(
        [{"prompt_token_ids": text} for text in texts], SamplingParams(**params), use_tqdm=False, **request
    )


def largest_difference(toy: Toy, found: Any, twin: Any = None) -> float:
    """Of the logarithms of the probabilities of what was written, from what the compiled model says of it."""
    largest = 0.0
    for output in found.outputs:
        text = [*found.prompt_token_ids, *output.token_ids]
        said = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        own = toy.log_probabilities(text, twin)[-len(said) :]
        largest = max(largest, (torch.tensor(said) - own).abs().max().item())
    return largest


def largest_difference_in_prompt(toy: Toy, found: Any) -> float:
    """The same of the prompt's tokens, asked for with `prompt_logprobs`. Where a toy is sure of what it writes, not
    even a mistake changes that.
    """
    said = [next(iter(step.values())).logprob for step in found.prompt_logprobs[1:]]
    return (torch.tensor(said) - toy.log_probabilities(list(found.prompt_token_ids))).abs().amax().item()
