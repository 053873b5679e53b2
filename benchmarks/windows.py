"""What a budget buys that knows the context: `python -m benchmarks.windows --text wiki.txt`.

No model with sliding windows comes as a package, so SmolLM2's weights run in Qwen2's class, whose layers may have them:
five with a window of 512 tokens to one without, as in Gemma 3. SmolLM2 was not trained for that and predicts worse, but
how its keys and values are stored makes as much difference as in a model that was: each plan is held against the same
model, uncompressed.

Plans of one budget for texts of several lengths; 0: of any, each layer counting alike, whatever its window holds. Each
is read in windows of text of several lengths, and `cache_bytes` is what a row of that many tokens takes.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.ablation import Bench, show
from kvmix_compile.evaluate.held_out import token_ids
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.models_zoo.smollm2 import load_smollm2

RESULTS = Path(__file__).parent / "results" / "windows.json"
CONTEXTS = (0, 2048, 8192)
# Of Gemma 3: config.json's sliding_window and the pattern of its layer_types.
SLIDING_WINDOW = 512
LAYERS_A_FULL_ONE = 6
# What both classes' configurations call alike, and mean alike.
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)


def with_windows(model: PreTrainedModel, window: int = SLIDING_WINDOW) -> Qwen2ForCausalLM:
    """The weights of a Llama in a model whose layers see `window` tokens, but for each sixth."""
    layers = model.config.num_hidden_layers
    kinds = ["sliding_attention" if number % LAYERS_A_FULL_ONE else "full_attention" for number in range(1, layers + 1)]
    config = Qwen2Config(
        **{name: getattr(model.config, name) for name in KEPT},
        use_sliding_window=True,
        sliding_window=window,
        layer_types=kinds,
    )
    windowed = Qwen2ForCausalLM(config).eval()
    # Qwen2 adds biases to queries, keys and values; Llama has none.
    biases = {name: torch.zeros_like(bias) for name, bias in windowed.named_parameters() if name.endswith("_proj.bias")}
    windowed.load_state_dict(model.state_dict() | biases)
    return windowed


def study(bench: Bench, ids: Tensor, budget: float, lengths: Iterable[int]) -> list[dict[str, Any]]:
    """Of each plan its figures, in windows of text of each of the lengths."""
    importance = bench.importance()
    plans = {f"context {context}": importance.allocate(budget=budget, context=context) for context in CONTEXTS}
    rows = []
    for length in lengths:
        for row in bench.results(plans, ids, length):
            plan = plans.get(row["configuration"])
            held = {"cache_bytes": plan.cache_bytes(length, 1, torch.float32)} if plan else {}
            rows.append({"window": length, **row, **held})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="the text to evaluate on")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 8192], help="of the windows that it is read in"
    )
    parser.add_argument("--budget", type=float, default=2.3)
    options = parser.parse_args()
    model, tokenizer = load_smollm2()
    ids = token_ids(tokenizer, options.text.read_text(), options.tokens)
    rows = study(Bench(with_windows(model), tokenizer), ids, options.budget, options.lengths)
    show("windows", rows)
    about = {"model": "smollm2 with windows", "sliding_window": SLIDING_WINDOW, "budget": options.budget}
    about |= {"text": options.text.name, "tokens": options.tokens, "results": rows}
    write_json(RESULTS, about | circumstances("benchmarks.windows", torch.device("cpu")))


if __name__ == "__main__":
    main()
