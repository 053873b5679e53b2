"""What two processes do with models whose weights are spread over them; test_tensor_parallel.py starts them with
torchrun, once for all that it looks at.

Each writes what it saw to FOLDER/rank-<its number>.pt. The first one also writes what the same models give on one
device.
"""

import copy
import json
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as distributed
import typer
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import kvmix_compile
from kvmix_command.main import app
from kvmix_compile import KVMixCache, KVMixError
from kvmix_compile.cli.conversation import Conversation, Style
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.shards import local_view

# In all but the last, each process has half of the heads of keys and values.
LATENTS = "deepseek_v3"
MODELS = ("llama", "qwen3", "gemma3", "mixtral", LATENTS)
# What differs from the model's own plan, which leaves this one's attention whole: heads of queries are spread, and all
# read the latents that each process keeps.
TP_PLANS: dict[str, dict[str, str]] = {
    LATENTS: {
        "model.layers.*.self_attn.q_b_proj": "colwise",
        "model.layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "model.layers.*.self_attn.kv_b_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
    }
}
OPTIONS: dict[str, Any] = {"sinks": 4, "recent": 32}
PROMPT = "The text that is gone on from."
# Nothing here takes as long, and nothing is to hang.
TIME_OUT = timedelta(seconds=60)


def rows(count: int, tokens: int) -> Tensor:
    return torch.randint(3, 128, (count, tokens), generator=torch.Generator().manual_seed(1))


def spread(folder: Path, tp_plan: dict[str, str] | None = None) -> Any:
    """The model of a folder, its weights spread over both processes, by its own plan but for these rules."""
    config = DistributedConfig(tp_size=2, tp_plan=tp_plan)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()


def saved(name: str, folder: Path, rank: int, **settings: Any) -> Any:
    """A tiny model, spread, that the first process saved."""
    path = folder / "-".join([name, *map(str, settings.values())])
    if rank == 0 and not path.exists():
        tiny(name, **settings).save_pretrained(path)
    distributed.barrier()
    return spread(path, TP_PLANS.get(name))


def given_by(twin: Any) -> dict[str, Any]:
    """What a compiled model gives: its plan, logits of a prompt and of a step, texts, and the size of its cache."""
    ids, cache = rows(2, 100), KVMixCache(twin)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    prompt = twin(ids, cache=cache).logits
    return {
        "plan": twin.kvmix_plan,
        "logits": torch.cat([prompt, twin(ids[:, :1], cache=cache).logits], dim=1),
        "bytes": cache.nbytes - cache.lengths.nbytes,
        "text": twin.generate(ids, max_new_tokens=30, do_sample=False),
        "padded": twin.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False),
    }


def refused(call: Callable[[], object]) -> str:
    """What is said of a call that is refused; else empty."""
    try:
        call()
    except KVMixError as error:
        return str(error)
    return ""


def of_model(name: str, folder: Path, rank: int) -> dict[str, Any]:
    """Compiled by a budget: spread, and by the first process on one device."""
    model, ids = saved(name, folder, rank), rows(1, 30)
    with torch.no_grad():
        before = model(ids).logits
        twin = kvmix_compile.apply(model, budget=2.3, calibration=rows(2, 160), **OPTIONS)
        untouched = torch.equal(before, model(ids).logits)
    found = {"spread": given_by(twin), "untouched": untouched, "verified": twin.kvmix_report.verified}
    if rank == 0:
        alone = kvmix_compile.apply(tiny(name), budget=2.3, calibration=rows(2, 160), **OPTIONS)
        alone.kvmix_plan.save(folder / f"{name}.json")
        found["alone"] = given_by(alone)
    distributed.barrier()
    return found


def of_importance(name: str, folder: Path, rank: int) -> dict[str, Any]:
    """Measured spread, and by the first process on one device."""
    calibration = rows(2, 160)
    found = {"spread": kvmix_compile.analyze(saved(name, folder, rank), calibration=calibration, **OPTIONS)}
    if rank == 0:
        found["alone"] = kvmix_compile.analyze(tiny(name), calibration=calibration, **OPTIONS)
    distributed.barrier()
    return found


def of_weights(twin: Any, model: Any) -> dict[str, Any]:
    """A weight that is changed in place, and one that gives way to another."""
    ids, weight = rows(1, 40), model.model.layers[0].mlp.down_proj.weight
    before = twin(ids).logits
    with torch.no_grad():
        weight.mul_(1.5)
        follows = (twin(ids).logits - model(ids).logits).abs().max().item()
        changed = not torch.equal(before, twin(ids).logits)
        weight.div_(1.5)
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(weight.detach().clone())
    replaced = refused(lambda: twin(ids))
    model.model.layers[0].mlp.down_proj.weight = weight
    return {"follows": follows, "changed": changed, "replaced": replaced}


def of_caches(twin: Any, folder: Path, rank: int) -> dict[str, Any]:
    """Saved, loaded and gone on from; and files that are each other's, and a damaged one."""
    ids, cache, path = rows(2, 100), KVMixCache(twin), folder / "prompt.safetensors"
    twin(ids, cache=cache)
    cache.save(path)
    loaded = KVMixCache.load(path, twin)
    goes_on = torch.equal(twin(ids[:, :5], cache=loaded).logits, twin(ids[:, :5], cache=cache).logits)
    files = [folder / f"prompt-0000{number}-of-00002.safetensors" for number in (1, 2)]
    others = files[1 - rank].read_bytes()
    distributed.barrier()
    files[rank].write_bytes(others)
    swapped = refused(lambda: KVMixCache.load(path, twin))
    cache.save(path)
    if rank == 1:
        files[1].write_bytes(others[: len(others) // 2])
    damaged = refused(lambda: KVMixCache.load(path, twin))
    return {"goes on": goes_on, "swapped": swapped, "damaged": damaged}


def of_refusals(twin: Any, model: Any, folder: Path, rank: int) -> dict[str, str]:
    """What each process says of what one or both cannot do."""
    plan, ids = twin.kvmix_plan, rows(1, 40)
    found = {
        "a plan that one lacks": refused(
            lambda: kvmix_compile.apply(model, plan=folder / ("llama.json" if rank else "none.json"))
        ),
        "other budgets": refused(lambda: kvmix_compile.apply(model, budget=2.3 + rank, calibration=rows(2, 160))),
        "one compiles": refused(lambda: kvmix_compile.apply(model, plan=plan, compile=rank == 1)),
        "other texts": refused(lambda: twin(ids + rank)),
        "copy": refused(lambda: copy.deepcopy(twin)),
        "pickle": refused(lambda: pickle.dumps(twin)),
        "backend": refused(lambda: torch.compile(model, backend="kvmix", options={"plan": plan})(ids)),
    }
    with inductor_config.patch({"cpp.cxx": ("g++", "none")[rank]}):
        found["no compiler in one"] = refused(lambda: kvmix_compile.apply(model, plan=plan, compile=True))
    norm = model.model.norm.weight
    with torch.no_grad():
        norm_before = norm.clone()
        norm[0] = torch.nan if rank else norm[0]
        found["a weight of one is NaN"] = refused(lambda: kvmix_compile.apply(model, plan=plan))
        norm.copy_(norm_before)
    rules = model.tp_plan
    model.tp_plan = {**rules, "model.norm": "sequence_parallel"}
    found["a style"] = refused(lambda: kvmix_compile.apply(model, plan=plan))
    model.tp_plan = {name: style for name, style in rules.items() if "o_proj" not in name}
    found["no style"] = refused(lambda: kvmix_compile.apply(model, plan=plan))
    model.tp_plan = rules
    for what, settings in (("one head", {"num_key_value_heads": 1}), ("odd", {"vocab_size": 129})):
        other = saved("llama", folder, rank, **settings)
        found[what] = refused(lambda other=other: kvmix_compile.apply(other, plan=plan))
    return found


def written_by(words: Sequence[object], typed: str = "") -> str:
    """What a command writes to standard output in this process, where a user types this, in the first one alone."""
    output = StringIO()
    with patch.object(sys, "stdin", StringIO(typed)), redirect_stdout(output):
        app([str(word) for word in words], standalone_mode=False)
    distributed.barrier()
    return output.getvalue().strip()


def of_commands(folder: Path, rank: int) -> dict[str, Any]:
    """Commands in both processes, and what the first process gets on one device."""
    tokenizer, path = character_tokenizer(), folder / "llama"
    text, said, measured = folder / "text.txt", folder / "said.json", folder / "eval.json"
    if rank == 0:
        tokenizer.save_pretrained(path)
        text.write_text(PROMPT * 12)
    distributed.barrier()
    by_plan = [path, "--plan", folder / "llama.json"]
    found: dict[str, Any] = {
        "generate": written_by(["generate", *by_plan, "--prompt", PROMPT, "--max-new-tokens", 20]),
        "chat": written_by(["chat", *by_plan, "--max-new-tokens", 20], f"{PROMPT}\n/save {said}\n" * (rank == 0)),
        "eval": written_by(["eval", *by_plan, "--text", text, "--calibration", text, "--json", measured]),
        "serve": refused_words(["serve", *by_plan]),
    }
    if rank == 0:
        alone = kvmix_compile.apply(tiny("llama"), plan=folder / "llama.json")
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        written = alone.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        found["generated alone"] = tokenizer.decode(written, skip_special_tokens=True).strip()
        found["said"] = json.loads(said.read_text())[-1]["content"]
        found["said alone"] = Conversation(alone, tokenizer, Style(max_new_tokens=20)).say(PROMPT, lambda _: None).text
        results = json.loads(measured.read_text())["texts"][0]["results"]
        found["perplexities"] = [result["perplexity"] for result in results]
        whole = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][0]
        found["perplexities alone"] = [kvmix_compile.perplexity(model, whole) for model in (tiny("llama"), alone)]
    distributed.barrier()
    return found


def refused_words(words: Sequence[object]) -> str:
    """What is said of a command that is refused before anything is loaded."""
    try:
        app([str(word) for word in words], standalone_mode=False)
    except typer.BadParameter as error:
        return error.format_message()
    return ""


class Toy(nn.Module):
    """A module for every style that one linear layer or embedding can have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_rowwise, self.embedding_colwise = nn.Embedding(6, 8, padding_idx=5), nn.Embedding(6, 8)
        self.colwise, self.rowwise = nn.Linear(8, 12), nn.Linear(12, 8)
        self.rowwise_rep, self.rowwise_split_input = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.colwise_rep, self.colwise_gather_output = nn.Linear(8, 6), nn.Linear(8, 6)
        self.moe_identity_expert, self.all_reduce = nn.Identity(), nn.Identity()
        self.replicate = nn.LayerNorm(8)
        self.tp_plan = {name: name for name, _ in self.named_children()}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding_rowwise(ids) + self.embedding_colwise(ids)
        x = self.rowwise(self.colwise(x)) + self.rowwise_rep(x) + self.rowwise_split_input(x)
        x = self.all_reduce(self.moe_identity_expert(self.replicate(x)))
        return self.colwise_rep(x) - self.colwise_gather_output(x)


def of_styles() -> dict[str, Any]:
    """Every one of the toy's: alone, as transformers computes it, and as a graph would be made of it."""
    torch.manual_seed(0)
    toy, ids = Toy(), torch.arange(6)[None]
    with torch.no_grad():
        alone = toy(ids)
        rules = {
            name: rule
            for rule in toy.tp_plan
            for name in [*(f"{rule}.{part}" for part, _ in toy.get_submodule(rule).named_parameters()), rule]
        }
        apply_tensor_parallelism(toy, init_device_mesh("cpu", (2,)), {name: name.split(".")[0] for name in rules})
        return {"alone": alone, "transformers": toy(ids), "view": local_view(toy)(ids)}


def main(folder: Path) -> None:
    distributed.init_process_group("gloo", timeout=TIME_OUT)
    rank = distributed.get_rank()
    found: dict[str, Any] = {"styles": of_styles()}
    for name in MODELS:
        found[name] = of_model(name, folder, rank)
    model = spread(folder / "llama")
    twin = kvmix_compile.apply(model, plan=folder / "llama.json")
    found["by the plan of one device"] = {"spread": given_by(twin)}
    found["weights"] = of_weights(twin, model)
    found["caches"] = of_caches(twin, folder, rank)
    found["refusals"] = of_refusals(twin, model, folder, rank)
    found["on its own words"] = kvmix_compile.analyze(model, **OPTIONS).allocate(budget=2.3)
    # Of the one each process has some of the heads, of the other all.
    found["importance"] = {name: of_importance(name, folder, rank) for name in ("llama", "phi3")}
    found["commands"] = of_commands(folder, rank)
    torch.save(found, folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
