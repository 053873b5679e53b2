"""What is done with models whose layers are on two devices; test_device_map.py starts this in a process of its own,
once for all that it looks at.

What was seen goes to FOLDER/found.pt, on the CPU.
"""

import copy
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

import kvmix_compile
from kvmix_compile import KVMixCache, KVMixConfig, KVMixError
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.graph.vocabulary import operation
from tests.helpers.toy_device import DEVICES, compile_toy_device, load_toy_device

FIRST, SECOND = DEVICES
# Of the devices there are: what each of these models has that lies on one of them, or is told to both.
MODELS = {
    "llama": "rotary tables",
    "gemma3": "two pairs of these, windows, and an embedding that is the head too",
    "bloom": "slopes, which are no weights",
    "lfm2": "a layer that carries a state of another kind",
}
KINDS = {
    "gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"]},
}
OPTIONS: dict[str, Any] = {"sinks": 4, "recent": 32}
# One on the first device, and two on the second.
LAYERS = 3


def rows(count: int, tokens: int) -> Tensor:
    return torch.randint(3, 128, (count, tokens), generator=torch.Generator().manual_seed(1))


def toy(name: str) -> Any:
    return tiny(name, num_hidden_layers=LAYERS, **KINDS.get(name, {}))


def device_map_of(model: Any) -> dict[str, str]:
    """The first layer on one device, the others on the other, and the rest where it is usually put."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    found = {"lm_head": FIRST if tied else SECOND}
    for name, part in model.base_model.named_children():
        path = f"{model.base_model_prefix}.{name}"
        if isinstance(part, nn.ModuleList):
            found |= {f"{path}.{index}": DEVICES[min(index, 1)] for index in range(len(part))}
        else:
            found[path] = SECOND if name in ("norm", "ln_f") else FIRST
    return found


def spread(model: Any, device_map: Mapping[str, str] | None = None, main: str = FIRST) -> Any:
    """The model, its layers on both devices. main: where accelerate moves a call's arguments first."""
    return dispatch_model(model, dict(device_map or device_map_of(model)), main_device=main)


def given_by(twin: Any, folder: Path) -> dict[str, Any]:
    """What a compiled model gives: its plan, logits of a prompt and of a step, that step on a cache from a file, texts,
    and what its cache takes.
    """
    path = folder / "prompt.safetensors"
    ids, cache = rows(2, 60), KVMixCache(twin)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    prompt = twin(ids, cache=cache).logits
    cache.save(path)
    loaded = KVMixCache.load(path, twin)
    step, again = (twin(ids[:, :1], cache=held).logits for held in (cache, loaded))
    torch.manual_seed(3)
    return {
        "plan": twin.kvmix_plan,
        "logits": torch.cat([prompt, step], dim=1),
        "logits are on": prompt.device.type,
        "goes on from a file": torch.equal(step, again),
        "bytes": cache.nbytes,
        "devices": [str(state.recent_k.device) for state in cache.states],
        "text": twin.generate(ids, max_new_tokens=12, do_sample=False),
        "padded": twin.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False),
        "beams": twin.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=6, do_sample=False),
        "sampled": twin.generate(ids, max_new_tokens=6, do_sample=True),
    }


def refused(call: Callable[[], object]) -> str:
    """What is said of a call that is refused; else empty."""
    try:
        call()
    except KVMixError as error:
        return str(error)
    return ""


def applied(model: Any, **options: Any) -> Any:
    return kvmix_compile.apply(model, **({"budget": 2.3, "calibration": rows(2, 100), **OPTIONS} | options))


def of_model(name: str, folder: Path) -> dict[str, Any]:
    """Compiled by a budget: on the CPU, and spread."""
    main, ids = SECOND if name == "gemma3" else FIRST, rows(1, 30)
    model = spread(toy(name), main=main)
    twin = applied(model)
    with torch.no_grad():
        untouched = torch.equal(model(ids).logits, spread(toy(name), main=main)(ids).logits)
    alone = applied(toy(name))
    return {
        "spread": given_by(twin, folder),
        "alone": given_by(alone, folder),
        "untouched": untouched,
        "verified": twin.kvmix_report.verified,
        "where logits are": str(twin(ids.to(FIRST)).logits.device),
    }


def moves(twin: Any) -> list[str]:
    """What the rewritten graph moves from device to device: the operation that made it, or the name of an input."""
    graph, found, where = twin.kvmix_program.rewritten.module.graph, [], dict[Any, Any]()
    for node in graph.nodes:
        device = node.kwargs.get("device") if operation(node) == "to" else None
        if device is not None and where.setdefault((node.args[0], device), node) is node:
            found.append(node.args[0].name if node.args[0].op == "placeholder" else operation(node.args[0]))
        elif device is not None:
            found.append(f"{node.args[0].name} again")
    return found


def of_caches(twin: Any, alone: Any, folder: Path) -> dict[str, Any]:
    """Of one device and of two: cropped, its rows chosen, saved, loaded, and gone on from."""
    ids, path, found = rows(2, 60), folder / "prompt.safetensors", {}
    for name, source, target in (("gathered", twin, alone), ("spread", alone, twin), ("same", twin, twin)):
        cache = KVMixCache(source, rollback=8)
        source(ids, cache=cache)
        cache.save(path)
        loaded = KVMixCache.load(path, target)
        found[name] = source(ids[:, :5], cache=cache).logits, target(ids[:, :5], cache=loaded).logits
    cropped, new = KVMixCache(twin, rollback=8), KVMixCache(alone, rollback=8)
    for cache, model in ((cropped, twin), (new, alone)):
        model(ids, cache=cache)
        cache.crop(-5)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
    goes_on = rows(3, 4)
    found["cropped"] = alone(goes_on, cache=new).logits, twin(goes_on, cache=cropped).logits
    return found


def of_other_map(plan: Any) -> dict[str, Any]:
    """Compiled by a plan that was made with another device_map."""
    model = toy("llama")
    twin = kvmix_compile.apply(spread(model, device_map_of(model) | {"model.layers.1": FIRST}), plan=plan)
    return {
        "seconds": twin.kvmix_report.seconds,
        "text": twin.generate(rows(2, 60), max_new_tokens=12, do_sample=False),
    }


def of_folders(plan: Any, folder: Path) -> dict[str, Any]:
    """Loaded by transformers with a device_map: compressed as it is loaded, and from a folder that says so itself."""
    toy("llama").save_pretrained(folder / "plain")
    device_map, ids = device_map_of(toy("llama")), rows(1, 40)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "plain", device_map=device_map, quantization_config=KVMixConfig(plan=plan)
    )
    loaded.save_pretrained(folder / "compressed")
    again = AutoModelForCausalLM.from_pretrained(folder / "compressed", device_map=device_map)
    return {
        name: model.generate(ids, max_new_tokens=8, do_sample=False)
        for name, model in (("loaded", loaded), ("again", again))
    }


class Crossing(nn.Module):
    """One layer of attention whose values are made on another device than its keys, and moved there or not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        query, key, value = (
            part(hidden).unflatten(2, (2, 16)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        future = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).triu(1)
        weights = (query @ key.mT / 4).masked_fill(future, -torch.inf).softmax(-1).to(value.device)
        return self.head((weights @ value).transpose(1, 2).flatten(2))


def of_refusals(plan: Any, twin: Any) -> dict[str, str]:
    split = device_map_of(toy("llama"))
    del split["model.layers.0"]
    split |= dict.fromkeys(
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj",
         "model.layers.0.mlp", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"), FIRST
    )  # fmt: skip
    split["model.layers.0.self_attn.v_proj"] = SECOND
    crossing = dict.fromkeys(("embedding", "query", "key"), FIRST) | dict.fromkeys(("value", "head"), SECOND)
    by_hand = toy("llama")
    by_hand.lm_head.to(SECOND)
    model = spread(toy("llama"))
    found = {
        "a layer is split": refused(lambda: applied(spread(toy("llama"), split))),
        "values on another device": refused(lambda: applied(spread(Crossing().eval(), crossing))),
        "no device_map": refused(lambda: applied(by_hand)),
        "compile": refused(lambda: kvmix_compile.apply(model, plan=plan, compile=True)),
        "pickle": refused(lambda: pickle.dumps(twin)),
        "offloaded": refused(lambda: applied(spread(toy("llama"), device_map_of(model) | {"model.layers.1": "cpu"}))),
        "backend": refused(lambda: torch.compile(model, backend="kvmix", options={"plan": plan})(rows(1, 40))),
    }
    nn.Module.to(twin, FIRST)
    found["moved"] = refused(lambda: twin(rows(1, 40)))
    return found


def of_own_forward(twin: Any, alone: Any) -> dict[str, Any]:
    """Embeddings, which are read by the model's own forward, and a step by the graph behind them."""
    given = {}
    for name, model in (("spread", twin), ("alone", alone)):
        cache, embedding = KVMixCache(model), model.get_input_embeddings()
        ids = rows(2, 40).to(embedding.weight.device)
        first = model(inputs_embeds=embedding(ids), cache=cache).logits
        more = model(inputs_embeds=embedding(ids[:, :4]), cache=cache).logits
        given[name] = torch.cat([first, more, model(ids[:, :1], cache=cache).logits], dim=1)
    return given


def of_refresh(twin: Any) -> dict[str, Any]:
    """A compiled model in which a layer was given another norm, captured anew, and what the original gives then."""
    ids, layer = rows(1, 40), twin.model.layers[LAYERS - 1]
    before = twin(ids).logits
    layer.post_attention_layernorm.variance_epsilon = 0.5
    stale = refused(lambda: twin(ids))
    twin.kvmix_refresh()
    original = toy("llama")
    original.model.layers[LAYERS - 1].post_attention_layernorm.variance_epsilon = 0.5
    with torch.no_grad():
        return {"before": before, "stale": stale, "after": twin(ids).logits, "expected": original(ids).logits}


def main(folder: Path) -> None:
    load_toy_device(compile_toy_device(folder))
    found: dict[str, Any] = {name: of_model(name, folder) for name in MODELS}
    plan = found["llama"]["spread"]["plan"]
    twin, alone = (kvmix_compile.apply(model, plan=plan) for model in (spread(toy("llama")), toy("llama")))
    found["moves"] = moves(twin)
    found["caches"] = of_caches(twin, alone, folder)
    found["own forward"] = of_own_forward(twin, alone)
    prompt, assistant = rows(1, 40).to(FIRST), tiny("llama", num_hidden_layers=1)
    found["text"] = twin.generate(prompt, max_new_tokens=8, do_sample=False)
    found["drafts"] = twin.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    found["of the copy"] = copy.deepcopy(twin).generate(prompt, max_new_tokens=8, do_sample=False)
    found["second start"] = kvmix_compile.apply(spread(toy("llama")), plan=plan).kvmix_report.seconds
    found["other map"] = of_other_map(plan)
    found["folders"] = of_folders(plan, folder)
    found["refusals"] = of_refusals(plan, twin)
    found["refresh"] = of_refresh(kvmix_compile.apply(spread(toy("llama")), plan=plan))
    # Who looks at it has no such devices.
    torch.save(tree_map_only(Tensor, Tensor.cpu, found), folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
