"""Seconds from a process's start to its first answer: `python -m benchmarks.start [--repeats 3]`.

SmolLM2, compressed, lies in a folder, and a newcomer's script loads it and generates from it: captured and verified as
if nothing had been kept, and with what an earlier start kept. Every run is a process of its own; medians are taken.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

import kvmix_compile
from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.models_zoo.smollm2 import load_smollm2

RESULTS = Path(__file__).parent / "results" / "start.json"

SCRIPT = """
import json, sys, time
begin = time.perf_counter()
times = {}
def passed(stage):
    global begin
    times[stage], begin = time.perf_counter() - begin, time.perf_counter()
import torch
passed("import torch")
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
passed("import transformers")
import kvmix_compile
passed("import kvmix_compile")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
passed("tokenizer")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
passed("from_pretrained")
ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
model.generate(ids, max_new_tokens=1, do_sample=False)
passed("first token")
model.generate(ids, max_new_tokens=20, do_sample=False)
passed("20 tokens")
print(json.dumps({"stages": times, "within from_pretrained": model.kvmix_report.seconds}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "small"
        model, tokenizer = load_smollm2()
        small = kvmix_compile.apply(model, budget=2.3, calibration="uniform text " * 64, tokenizer=tokenizer)
        small.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = {"KVMIX_CACHE": str(Path(scratch) / "cache"), "HF_HUB_OFFLINE": "1"}
        run(folder, settings | {"KVMIX_KEEP": "0"})  # compiles the CPU kernels, and reads every file once
        without = [run(folder, settings | {"KVMIX_KEEP": "0"}) for _ in range(options.repeats)]
        run(folder, settings)  # keeps what the next ones begin with
        kept = [run(folder, settings) for _ in range(options.repeats)]
    results = {"captured": medians(without), "kept": medians(kept)}
    for name, stages in results.items():
        print(name, ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items()))
    about = {"model": "smollm2", "results": results}
    write_json(RESULTS, about | circumstances("benchmarks.start", torch.device("cpu")))


def run(folder: Path, settings: dict[str, str]) -> dict[str, float]:
    """Seconds of each stage in a process of its own; those within `from_pretrained` have a dash in front."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    stages: dict[str, float] = told["stages"]
    within = {f"- {stage}": seconds for stage, seconds in told["within from_pretrained"].items()}
    return {**stages, "all": sum(stages.values()), **within}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each stage of several runs."""
    return {stage: median(each[stage] for each in runs) for stage in runs[0]}


if __name__ == "__main__":
    main()
