"""What bits lose of latents, and of the keys and values that are made of them: `python -m benchmarks.latents`.

No model with multi-head latent attention comes as a package, and of random weights nobody knows what a loss is. So a
small one of DeepSeek-V3's class (arXiv 2412.19437) is trained first, from a fixed seed, byte by byte on the manual that
comes with Python: ten minutes of two cores. Its heads have 8 times as many numbers a token as its latents and rotary
keys.

Then it is compressed in both ways, to the same stored bits an element, by the same measurement; and reads what it was
not trained on. `token_bytes` is what a token of a layer takes, and `smaller` how many times less that is than the
latents in 16 bits, which is what transformers caches of such a model.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from benchmarks.ablation import show
from kvmix_compile.compiler import Found, build, find_in
from kvmix_compile.evaluate.comparison import compare
from kvmix_compile.evaluate.configurations import Compiled, Configuration
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.measure.importance import measure
from kvmix_compile.progress import progress_bar
from kvmix_compile.report import Report

RESULTS = Path(__file__).parent / "results" / "latents.json"
# Heads and their sizes are in the proportions of DeepSeek-V3's: two thirds of a key are not rotary, and a latent has
# four times the numbers of a head's values.
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
    # No layer is a mixture of experts.
    "first_k_dense_replace": 4,
}
LENGTH = 512  # bytes of a row
HELD_OUT, CALIBRATION_ROWS = 16384, 8
SINKS, RECENT = 4, 32
STORED_BITS = (16 / 2.8, 4.0, 3.0, 2.67)
LEARNING_RATE, BATCH = 2e-3, 4


class OfHeads(Found):
    """A captured model whose keys and values of every head are cached, as `apply` would refuse to: it looks at what the
    model's own cache holds.
    """

    own_cache_bytes = None


def text() -> Tensor:
    """The manual's bytes, int64 `[bytes]`."""
    return torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))


def rows_of(ids: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(ids.numel() - LENGTH, (rows,), generator=generator)
    return torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])


def trained(ids: Tensor, steps: int) -> tuple[PreTrainedModel, float]:
    """The model, and what it lost at the end, in nats a byte."""
    torch.manual_seed(0)
    model, generator = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    losses = []
    with progress_bar("training", steps, shown=True) as advance:
        for _ in range(steps):
            rows = rows_of(ids, BATCH, generator)
            loss = model(rows, labels=rows, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            advance()
    return model.eval(), sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :])


def ways(model: nn.Module) -> dict[str, Found]:
    """The model captured for a cache of its latents, and for one of every head's keys and values."""
    captured = capture(model)
    of_heads = OfHeads(captured, find_sites(captured).matched)
    return {"latents": find_in(captured, Report("latents")), "heads": of_heads}


def study(
    model: PreTrainedModel, calibration: Iterable[Tensor], ids: Tensor, stored_bits: Iterable[float]
) -> Iterator[dict[str, Any]]:
    """Of both ways what reading `ids` with so many bits an element loses, in windows of LENGTH."""
    rows, found = list(calibration), ways(model)
    narrow = sum(site.key_elements + site.value_elements for site in found["latents"].sites)
    for name, way in found.items():
        importance = measure(way.captured, way.sites, rows, sinks=SINKS, recent=RECENT)
        plans: list[Plan] = [importance.allocate(storage_budget=bits) for bits in stored_bits]
        twins = [Compiled(name, build(model, way, plan, Report(name))) for plan in plans]
        _, *results = compare([Configuration("original", model), *twins], ids, window=LENGTH)
        for plan, result in zip(plans, results, strict=True):
            taken = plan.token_bytes([torch.bfloat16] * len(way.sites))
            sizes = {"token_bytes": taken / len(way.sites), "smaller": 2 * narrow / taken}
            yield asdict(result) | sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of training")
    options = parser.parse_args()
    ids = text()
    held_out, seen = ids[-HELD_OUT:], ids[:-HELD_OUT]
    model, loss = trained(seen, options.steps)
    calibration = rows_of(seen, CALIBRATION_ROWS, torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows = list(study(model, calibration, held_out, STORED_BITS))
    show("latents", rows)
    about = {"training_steps": options.steps, "training_loss": loss, "held_out_bytes": HELD_OUT}
    about |= {"sinks": SINKS, "recent": RECENT, "results": rows}
    write_json(RESULTS, about | circumstances("benchmarks.latents", torch.device("cpu")))


if __name__ == "__main__":
    main()
