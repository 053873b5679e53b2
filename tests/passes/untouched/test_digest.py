"""A model's digest is the same for the same model, and another for every other whose graph may be another."""

import functools
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from kvmix_compile.models_zoo.tiny import DECODERS, tiny
from kvmix_compile.passes.untouched.digest import digest


@functools.cache
def of_llama() -> str | None:
    return digest(tiny("llama"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom", "falcon", "qwen3_next"])
def test_two_of_one_model_have_one_digest(name: str) -> None:
    model = tiny(name)
    first = digest(model)
    assert first is not None and len(first) == 64 and first == digest(tiny(name))
    with torch.no_grad():
        model(torch.arange(9)[None])
    assert name == "qwen3_next" or digest(model) == first


def test_every_toy_has_a_digest_of_its_own() -> None:
    assert len({digest(tiny(name)) for name in DECODERS}) == len(DECODERS)


def other_weight(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5


def other_buffer(model: LlamaForCausalLM) -> None:
    model.model.rotary_emb.inv_freq[1] *= 1.001


def other_dtype(model: LlamaForCausalLM) -> None:
    model.to(torch.bfloat16)


def other_setting(model: LlamaForCausalLM) -> None:
    model.config.rms_norm_eps = 1e-3


def other_attention(model: LlamaForCausalLM) -> None:
    model.set_attn_implementation("eager")


def other_number(model: LlamaForCausalLM) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def layers_exchanged(model: LlamaForCausalLM) -> None:
    model.model.layers = nn.ModuleList(model.model.layers[::-1])


def other_activation(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def hook(model: LlamaForCausalLM) -> None:
    model.model.layers[1].register_forward_hook(lambda module, given, found: None)


def other_forward(model: LlamaForCausalLM) -> None:
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: 2 * forward(hidden)


@pytest.mark.parametrize(
    "change",
    [other_weight, other_buffer, other_dtype, other_setting, other_attention, other_number, layers_exchanged,
     other_activation, hook, other_forward],
)  # fmt: skip
def test_what_was_changed_in_a_model_is_seen(change: Callable[[LlamaForCausalLM], None]) -> None:
    model = tiny("llama")
    change(model)
    assert digest(model) != of_llama()


def twice(original: FunctionType) -> Callable[..., object]:
    @functools.wraps(original)
    def changed(*given: object, **named: object) -> object:
        return original(*given, **named)

    return changed


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (modeling_llama, "apply_rotary_pos_emb"),
        (modeling_llama, "rotate_half"),
        (modeling_llama.LlamaMLP, "forward"),
        (modeling_llama.LlamaRMSNorm, "forward"),
    ],
)
def test_code_that_was_put_in_the_place_of_the_models_is_seen(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_llama()
    # It says that it is the original, as what is put there mostly does.
    monkeypatch.setattr(owner, name, twice(getattr(owner, name)))
    assert digest(tiny("llama")) != expected


def test_another_number_in_the_code_is_seen() -> None:
    def model(factor: float) -> nn.Module:
        namespace: dict[str, type[nn.Module]] = {"Module": nn.Module}
        source = f"class Own(Module):\n def forward(self, x):\n  def inner(): return x * {factor}\n  return inner()"
        exec(source, namespace)
        return namespace["Own"]()

    assert digest(model(2.0)) == digest(model(2.0)) != digest(model(2.5))


def test_a_files_tables_are_told_whatever_their_order() -> None:
    def model(table: str) -> nn.Module:
        namespace: dict[str, type[nn.Module]] = {"Module": nn.Module}
        exec(f"TABLE = {table}\nclass Own(Module):\n def forward(self, x): return x * TABLE['a']", namespace)
        return namespace["Own"]()

    assert digest(model("{'a': 1, 'b': 2}")) == digest(model("{'b': 2, 'a': 1}")) != digest(model("{'a': 2, 'b': 1}"))


class Closing(nn.Module):
    """Does what the function that it holds does."""

    def __init__(self, own: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)


def test_what_functions_close_over_is_seen_and_what_they_default_to() -> None:
    def closing(factor: float) -> Closing:
        return Closing(lambda x: x * factor)

    def defaulting(factor: float) -> Closing:
        return Closing(lambda x, by=factor: x * by)

    for kind in (closing, defaulting):
        assert digest(kind(2.0)) == digest(kind(2.0)) != digest(kind(2.5))


def test_weights_that_are_no_plain_elements_have_no_digest() -> None:
    class Packed(nn.Parameter):
        pass

    model = tiny("llama")
    model.lm_head.weight = Packed(model.lm_head.weight.detach())
    assert digest(model) is None
    assert digest(tiny("llama").to("meta")) is None


def test_a_large_weight_is_told_by_some_of_its_elements() -> None:
    model = nn.Linear(1024, 1024, bias=False)
    assert model.weight.nbytes > 2**20
    before = digest(model)
    with torch.no_grad():
        model.weight.mul_(1.5)
    assert digest(model) != before
