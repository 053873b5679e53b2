"""What fp8 and nvfp4 caches lose, in all layers and with some skipped: `python -m benchmarks.engines --text wiki.txt`.

Layers are chosen as `kvmix plan --for vllm` does, measured on built-in English. Then SmolLM2 reads the text through a
cache that rounds each token as it is written, as vLLM's does. Which layers are skipped is also tried the other way:
`worst` skips as many layers, those that are predicted to lose least.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation import show
from kvmix_compile.engines.measured import MOST_LOSS, MeasuredFormats, analyze
from kvmix_compile.engines.plan import EnginePlan, numbers_of
from kvmix_compile.evaluate.comparison import compare
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.engine_caches import EngineCached
from kvmix_compile.evaluate.held_out import token_ids
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.models_zoo.smollm2 import load_smollm2

RESULTS = Path(__file__).parent / "results" / "engines.json"
CHUNK = 512
BUDGETS = {"fp8": (9.0,), "nvfp4": (6.0, 8.0)}


def plans_of(measured: MeasuredFormats) -> dict[str, EnginePlan]:
    """By name, of each format: all layers, those that are recommended, and those that budgets leave."""
    plans: dict[str, EnginePlan] = {}
    for name, budgets in BUDGETS.items():
        plans[name] = measured.uniform(name)
        plans[f"{name}, most loss {MOST_LOSS:g}"] = measured.plan(name)
        for budget in budgets:
            plans[f"{name}, budget {budget:g}"] = measured.plan(name, budget=budget)
    first = BUDGETS["nvfp4"][0]
    plans[f"fp8 and nvfp4, budget {first:g}"] = measured.plan("fp8", "nvfp4", budget=first)
    plans[f"nvfp4, budget {first:g}, worst"] = worst(measured, plans[f"nvfp4, budget {first:g}"])
    return plans


def each_once(plans: Mapping[str, EnginePlan]) -> dict[str, EnginePlan]:
    """Under one name those that are alike."""
    names: dict[EnginePlan, list[str]] = {}
    for name, plan in plans.items():
        names.setdefault(plan, []).append(name)
    return {"; ".join(alike): plan for plan, alike in names.items()}


def worst(measured: MeasuredFormats, plan: EnginePlan) -> EnginePlan:
    """As many layers skipped as in `plan`, those that are predicted to lose least."""
    (kept,) = plan.formats
    order = sorted(range(len(plan.layers)), key=lambda index: measured.layers[index].loss(kept))
    skipped = set(order[: len(plan.skipped)])
    layers = [replace(layer, kept=None if index in skipped else kept) for index, layer in enumerate(plan.layers)]
    return replace(plan, layers=tuple(layers))


def study(model: Any, ids: Tensor, measured: MeasuredFormats) -> list[dict[str, Any]]:
    """Of each plan what it is predicted to lose, and what it loses on a text."""
    plans = each_once(plans_of(measured))
    caches = [EngineCached(name, model, plan) for name, plan in plans.items()]
    rows = []
    for result in compare([Configuration("original", model), *caches], ids, chunk=CHUNK, progress=True):
        row = asdict(result)
        del row["held_bits"], row["divergence"]["by_position"]
        if plan := plans.get(result.configuration):
            row |= {"predicted_loss": measured.loss(plan), "skipped": list(numbers_of(plan.skipped))}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="the text to evaluate on")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    model, tokenizer = load_smollm2()
    ids = token_ids(tokenizer, options.text.read_text(), options.tokens)
    measured = analyze(model, tokenizer=tokenizer, progress=True)
    calibrated = analyze(model, tokenizer=tokenizer, scales="calibrated", progress=True)
    rows = study(model, ids, measured)
    show("engines", rows)
    layers = [
        {"layer": layer.layers[0]}
        | {f"{each.name}_keys": loss for each, loss in layer.key_losses.items()}
        | {f"{each.name}_values": loss for each, loss in layer.value_losses.items()}
        for layer in measured.layers
    ]
    about = {"model": "smollm2", "text": options.text.name, "tokens": options.tokens, "chunk": CHUNK}
    about |= {"calibration_tokens": measured.tokens, "results": rows, "predicted_losses": layers}
    about["predicted_with_calibrated_scales"] = {name: calibrated.loss(calibrated.uniform(name)) for name in BUDGETS}
    write_json(RESULTS, about | circumstances("benchmarks.engines", torch.device("cpu")))


if __name__ == "__main__":
    main()
