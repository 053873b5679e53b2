"""What each ingredient buys, and how much calibration it takes: `python -m benchmarks.ablation --text wiki.txt`.

SmolLM2 is calibrated and compressed with one thing changed at a time and read through the cache; every row has
perplexity, KL divergence from the original and top-1 agreement. `--domain-text` is text of the evaluation's own kind to
calibrate on; it must not be the text that is evaluated.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmix_compile.calibration import DEFAULT_TOKENS, build_calibration
from kvmix_compile.compiler import CALIBRATION_LENGTH
from kvmix_compile.config import RECENT_WINDOWS
from kvmix_compile.evaluate.comparison import compare
from kvmix_compile.evaluate.configurations import Configuration, compile_plans
from kvmix_compile.evaluate.held_out import token_ids
from kvmix_compile.evaluate.perplexity import WINDOW
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.kernels.format import packing
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.models_zoo.smollm2 import load_smollm2
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.measure import sensitivity
from kvmix_compile.passes.measure.importance import Importance, measure
from kvmix_compile.passes.rewrite import rotation

RESULTS = Path(__file__).parent / "results"
SINKS, RECENT = RECENT_WINDOWS["fixed"]
STUDIES = ("ingredients", "calibration")
CALIBRATION_TOKENS = (512, 1024, 2048, 4096, 8192)


class Bench:
    """A model, captured once, and what it is calibrated on."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.captured = capture(self.model)
        self.sites = find_sites(self.captured).matched

    def importance(
        self, sinks: int = SINKS, recent: int = RECENT, tokens: int = DEFAULT_TOKENS, text: str | None = None
    ) -> Importance:
        texts = None if text is None else [text]
        chosen = build_calibration(self.model, self.tokenizer, texts, tokens=tokens, length=CALIBRATION_LENGTH)
        return measure(self.captured, self.sites, chosen.rows, sinks=sinks, recent=recent)

    def results(self, plans: Mapping[str, Plan], ids: Tensor, window: int = WINDOW) -> list[dict[str, Any]]:
        configurations = [Configuration("original", self.model), *compile_plans(self.model, plans)]
        return [asdict(result) for result in compare(configurations, ids, window=window, progress=True)]


def without(importance: Importance, unwanted: Callable[[Precision], bool]) -> Importance:
    """The same measurement with fewer candidates to choose from."""

    def kept(losses: Mapping[Precision, float]) -> dict[Precision, float]:
        return {precision: loss for precision, loss in losses.items() if not unwanted(precision)}

    return replace(
        importance,
        sites=tuple(
            replace(site, key_sensitivity=kept(site.key_sensitivity), value_sensitivity=kept(site.value_sensitivity))
            for site in importance.sites
        ),
    )


def has_tiers(precision: Precision) -> bool:
    """Whether a tier of the channels has bits of its own."""
    first, second, third, fourth = precision.tiers
    return first != second or third != fourth


def with_wide_scales(plan: Plan) -> Plan:
    """The same bits with 16-bit scales and zero points."""
    sites = [
        replace(site, key=replace(site.key, scale_bits=16), value=replace(site.value, scale_bits=16))
        for site in plan.sites
    ]
    return replace(plan, sites=tuple(sites))


def ingredients(bench: Bench, importance: Importance) -> dict[str, Plan]:
    """Plans at 2.3 code bits, each with one ingredient less."""
    every_read = replace(bench.importance(recent=0), recent=RECENT)
    plan = importance.allocate(budget=2.3)
    return {
        "as it is": plan,
        "gradients of every read, not of those from storage alone": every_read.allocate(budget=2.3),
        "all channels of a key alike": without(importance, lambda p: bool(p.important_bits)).allocate(budget=2.3),
        "halves of a key's channels, not quarters": without(importance, has_tiers).allocate(budget=2.3),
        "groups of 32 only": without(importance, lambda p: p.is_quantized and p.group != 32).allocate(budget=2.3),
        "16-bit scales and zero points": with_wide_scales(plan),
        "no attention sinks": bench.importance(sinks=0).allocate(budget=2.3),
        "4 attention sinks": bench.importance(sinks=4).allocate(budget=2.3),
        "32 recent tokens": bench.importance(recent=32).allocate(budget=2.3),
    }


def storage(importance: Importance) -> dict[str, Plan]:
    """Plans at budgets of stored bits, and what they would be with groups of 32 alone."""
    alike = without(importance, lambda p: p.is_quantized and p.group != 32)
    plans = {f"storage {bits:g}": importance.allocate(storage_budget=bits) for bits in (2.3, 2.67, 3.0)}
    return plans | {f"storage {bits:g}, groups of 32": alike.allocate(storage_budget=bits) for bits in (2.3, 2.67, 3.0)}


def changed_quantizers() -> dict[str, AbstractContextManager[object]]:
    """What is quantized, or how, changed within each context."""
    return {
        "values as they are, not rotated": patch.object(rotation, "block_of", lambda channels: 1),
        "groups keep their whole range": patch.object(packing, "REACH", dict.fromkeys(Axis, {})),
        "no single bits": patch.object(sensitivity, "CANDIDATE_BITS", (2, 3, 4, 8)),
    }


def calibrations(bench: Bench, domain_text: str | None) -> dict[str, Plan]:
    """Plans at 2.3 code bits from more and less calibration, built-in and of the domain."""
    plans = {
        f"{tokens} tokens of built-in English": bench.importance(tokens=tokens).allocate(budget=2.3)
        for tokens in CALIBRATION_TOKENS
    }
    if domain_text is not None:
        for tokens in CALIBRATION_TOKENS:
            plans[f"{tokens} tokens of the domain"] = bench.importance(tokens=tokens, text=domain_text).allocate(
                budget=2.3
            )
    return plans


def study_ingredients(bench: Bench, ids: Tensor) -> list[dict[str, Any]]:
    importance = bench.importance()
    rows = bench.results(ingredients(bench, importance) | storage(importance), ids)
    for name, changed in changed_quantizers().items():
        with changed:
            rows += bench.results({name: bench.importance().allocate(budget=2.3)}, ids)[1:]
    return rows


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="the text to evaluate on")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--domain-text", type=Path, help="other text of the same kind, to calibrate on")
    parser.add_argument("--study", choices=STUDIES, nargs="+", default=STUDIES)
    options = parser.parse_args(None if arguments is None else list(arguments))
    bench = Bench(*load_smollm2())
    ids = token_ids(bench.tokenizer, options.text.read_text(), options.tokens)
    domain_text = options.domain_text.read_text() if options.domain_text else None
    for study in options.study:
        if study == "ingredients":
            rows = study_ingredients(bench, ids)
        else:
            rows = bench.results(calibrations(bench, domain_text), ids)
        show(study, rows)
        about = {"model": "smollm2", "text": options.text.name, "tokens": options.tokens, "results": rows}
        write_json(RESULTS / f"{study}.json", about | circumstances("benchmarks.ablation", torch.device("cpu")))


def show(study: str, rows: Iterable[Mapping[str, Any]]) -> None:
    print(f"\n{study}")
    for row in rows:
        print(
            f"{row['configuration']:58} stored {row['stored_bits']:5.2f}  perplexity {row['perplexity']:7.3f}  "
            f"KL {row['divergence']['mean']:.4f}  top-1 {row['agreement']:.1%}"
        )


if __name__ == "__main__":
    main()
