"""What is done to a model after apply: weights are followed, everything else is refused by name."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.errors import CaptureError, InputError
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.captured import MODEL
from tests.helpers.lora import LoraLinear, put_on, take_off
from tests.helpers.stateful import stateful
from tests.helpers.toy_llama import ids, lossless

TEXT = ids(2, 70)
Change = Callable[[LlamaForCausalLM], object]


def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A toy Llama and its twin, which a test may change."""
    small = copy.deepcopy(lossless())
    return small.kvmix_program.rewritten.module.get_submodule(MODEL), small


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TEXT).logits


def assert_agree(small: nn.Module, model: nn.Module) -> None:
    torch.testing.assert_close(logits(small), logits(model), atol=1e-4, rtol=1e-4)


def assert_refused(small: nn.Module, message: str) -> None:
    past = KVMixCache(small)
    with pytest.raises(InputError, match=message):
        small(TEXT, past_key_values=past)
    assert past.seen == 0 and not past.states
    with pytest.raises(InputError, match=message):
        small.generate(TEXT, max_new_tokens=2)


def last(model: nn.Module) -> nn.Module:
    return model.model.layers[-1]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


REFUSED: dict[str, tuple[Change, str]] = {
    "an adapter put on": (put_on, r"layers\.0\.self_attn\.q_proj was replaced, a Linear by a LoraLinear"),
    "a module of the same kind": (
        lambda model: setattr(last(model).mlp, "up_proj", nn.Linear(128, 256, bias=False)), r"mlp\.up_proj was replaced"
    ),
    "a layer taken out": (lambda model: model.model.layers.__delitem__(1), r"model\.layers\.1 was removed"),
    "a layer more": (lambda model: model.model.layers.append(nn.Identity()), r"model\.layers\.2 was added"),
    "a hook": (
        lambda model: last(model).register_forward_hook(lambda *given: None),
        r"a forward hook of model\.layers\.1 was registered",
    ),
    "a hook before": (
        lambda model: last(model).mlp.register_forward_pre_hook(lambda *given: None), r"layers\.1\.mlp was registered"
    ),
    "a patched forward": (
        lambda model: setattr(last(model).mlp, "forward", lambda hidden: hidden), r"mlp\.forward was replaced"
    ),
    "a scale": (
        lambda model: setattr(last(model).self_attn, "scaling", 0.5), r"self_attn\.scaling was changed from .* to 0\.5"
    ),
    "a norm": (lambda model: setattr(model.model.norm, "variance_epsilon", 0.1), r"model\.norm\.variance_epsilon was"),
    "attention": (
        lambda model: model.set_attn_implementation("eager"), r"_attn_implementation.* was changed from sdpa to eager"
    ),
    "fewer layers": (
        lambda model: setattr(model.config, "num_hidden_layers", 1), r"config\.num_hidden_layers was changed"
    ),
    "training": (lambda model: model.train(), "was put into training mode"),
    "a module in training": (lambda model: last(model).train(), r"model\.layers\.1 was put into training mode"),
    "a parametrization": (
        lambda model: parametrize.register_parametrization(model.lm_head, "weight", Doubled()), "lm_head"
    ),
    "a bias": (
        lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(128))), r"lm_head\.bias was changed"
    ),
    "other sizes": (lambda model: model.resize_token_embeddings(130), "130 token embeddings"),
}  # fmt: skip


# What a twin does not let be done to it.
AT_ONCE = {"training": "is not trained", "other sizes": "resize_token_embeddings is not available"}

# Parameters are there in both, so that what is done to a twin's is done to the original's.
OF_PARAMETERS = {"a bias", "a parametrization"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_done_to_the_original_is_refused(name: str) -> None:
    model, small = pair()
    change, message = REFUSED[name]
    assert_agree(small, model)
    change(model)
    assert_refused(small, message)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_done_to_the_twin_is_refused_and_not_done_to_the_original(name: str) -> None:
    model, small = pair()
    change, message = REFUSED[name]
    before = logits(model)
    if name in AT_ONCE:
        with pytest.raises(InputError, match=AT_ONCE[name]):
            change(small)
    else:
        change(small)
        assert_refused(small, message)
    if name not in OF_PARAMETERS:
        assert not model.training and torch.equal(logits(model), before)


def test_a_class_whose_forward_is_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, small = pair()
    kind = type(last(model).mlp)
    monkeypatch.setattr(kind, "forward", lambda self, hidden: hidden)
    assert_refused(small, "the forward of LlamaMLP was replaced")
    monkeypatch.undo()
    assert_agree(small, model)


def replace_weight(model: LlamaForCausalLM) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


def load(model: LlamaForCausalLM, **options: bool) -> None:
    model.load_state_dict(tiny("llama", seed=7).state_dict(), **options)


def merge(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data += torch.randn(128, 4) @ torch.randn(4, 128) * 0.1


def train_and_evaluate(model: LlamaForCausalLM) -> None:
    model.train()
    model(TEXT, labels=TEXT).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model.eval()


FOLLOWED: dict[str, Change] = {
    "a state dict": load,
    "a state dict of other tensors": lambda model: load(model, assign=True),
    "weights merged in place": merge,
    "another parameter": replace_weight,
    "training": train_and_evaluate,
    "the padding token": lambda model: setattr(model.config, "pad_token_id", 5),
    "how to generate": lambda model: setattr(model.generation_config, "max_length", 30),
    "no cache": lambda model: setattr(model.config, "use_cache", False),
    "what nobody reads": lambda model: setattr(last(model), "remark", "none"),
    "running": lambda model: logits(model),
    "moving": lambda model: model.to("cpu"),
    "evaluation mode": lambda model: model.eval(),
    "a default made explicit": lambda model: setattr(last(model), "gradient_checkpointing", False),
    "frozen weights": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("whose", ["original", "twin"])
def test_weights_are_followed_whichever_they_are_changed_through(name: str, whose: str) -> None:
    if (name, whose) == ("training", "twin"):
        pytest.skip("a twin records no gradients")
    model, small = pair()
    FOLLOWED[name](model if whose == "original" else small)
    assert_agree(small, model)


@cache
def adapted() -> LlamaForCausalLM:
    """The lossless twin of a model that has adapters."""
    model = tiny("llama")
    put_on(model)
    return kvmix_compile.apply(model, budget=16, calibration=ids(2, 64), sinks=4, recent=32)


ADAPTERS: dict[str, tuple[Callable[[LoraLinear], object], Callable[[LoraLinear], object], str]] = {
    "switched": (lambda it: it.set_adapter("second"), lambda it: it.set_adapter("first"), "_active_adapter"),
    "both": (lambda it: it.set_adapter(["first", "second"]), lambda it: it.set_adapter("first"), "_active_adapter"),
    "disabled": (lambda it: it.enable_adapters(False), lambda it: it.enable_adapters(True), "_disable_adapters"),
    "merged": (lambda it: it.merge(), lambda it: it.unmerge(), "merged_adapters"),
    "scaled": (lambda it: it.scaling.update(first=2.0), lambda it: it.scaling.update(first=0.5), "scaling"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_were_there_are_followed_or_refused(name: str) -> None:
    small = copy.deepcopy(adapted())
    model = small.kvmix_program.rewritten.module.get_submodule(MODEL)
    change, undo, message = ADAPTERS[name]
    adapters = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for adapter in adapters:
        adapter.lora_A["first"].weight.data.normal_()  # trained further
    assert_agree(small, model)
    for adapter in adapters:
        change(adapter)
    assert_refused(small, rf"layers\.0\.self_attn\.q_proj\.{message} was changed")
    with pytest.raises(InputError, match=message):
        copy.deepcopy(small)
    for adapter in adapters:
        undo(adapter)
    assert_agree(small, model)


def test_adapters_taken_off_are_refused_and_another_twin_is_right() -> None:
    small = copy.deepcopy(adapted())
    model = small.kvmix_program.rewritten.module.get_submodule(MODEL)
    take_off(model)
    assert_refused(small, "q_proj was replaced, a LoraLinear by a Linear")
    assert_agree(kvmix_compile.apply(model, plan=lossless().kvmix_plan), model)


def test_a_cache_that_is_filled_goes_on() -> None:
    """The model is looked at when a text begins."""
    model, small = pair()
    past = KVMixCache(small)
    expected = logits(model)
    small(TEXT[:, :60], past_key_values=past)
    model.train()
    torch.testing.assert_close(small(TEXT[:, 60:], past_key_values=past).logits, expected[:, 60:], atol=1e-4, rtol=1e-4)


def test_hooks_of_the_model_itself() -> None:
    """One that was there is in the graph; one of the twin's own runs around it."""
    model = tiny("llama", num_hidden_layers=1)
    model.register_forward_hook(lambda module, given, output: type(output)(logits=2 * output.logits))
    small = kvmix_compile.apply(model, budget=16, calibration=ids(2, 64), sinks=4, recent=32)
    assert_agree(small, model)
    before = logits(small)
    handle = small.register_forward_hook(lambda module, given, output: type(output)(logits=-output.logits))
    assert torch.equal(logits(small), -before)
    handle.remove()
    model.register_forward_hook(lambda module, given, output: None)
    assert_refused(small, "a forward hook of the model was registered")


def test_what_a_forward_writes_itself_is_no_change() -> None:
    model = stateful()
    small = kvmix_compile.apply(model, budget=16, calibration=ids(2, 64), sinks=4, recent=32)
    for length in (9, 70):
        with torch.no_grad():
            expected = model(TEXT[:, :length])
        torch.testing.assert_close(small(TEXT[:, :length]), expected, atol=1e-4, rtol=1e-4)


def test_a_twin_has_settings_of_its_own() -> None:
    model, small = pair()
    small.config.use_cache, small.generation_config.max_length = False, 33
    assert model.config.use_cache and model.generation_config.max_length != 33
    assert small.model.config is small.config is small.model.layers[0].self_attn.config
    copied = copy.deepcopy(small)
    assert not copied.config.use_cache and copied.generation_config.max_length == 33
    assert_agree(copied, model)


@pytest.mark.parametrize("how", ["argument", "config", "own config"])
def test_early_exit_is_refused_before_anything_changes(how: str) -> None:
    model, small = pair()
    options: dict[str, object] = {"assistant_early_exit": 1} if how == "argument" else {}
    if how == "config":
        options["generation_config"] = copy.deepcopy(small.generation_config)
        options["generation_config"].assistant_early_exit = 1
    if how == "own config":
        small.generation_config.assistant_early_exit = 1
    with pytest.raises(InputError, match="assistant_early_exit drafts with the first layers alone"):
        small.generate(TEXT[:1], max_new_tokens=3, **options)
    assert model.config.num_hidden_layers == small.config.num_hidden_layers == 2
    assert_agree(small, model)


def test_a_twin_is_not_compiled_again() -> None:
    with pytest.raises(CaptureError, match="pass the original model"):
        kvmix_compile.apply(lossless(), budget=3)
