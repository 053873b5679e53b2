"""SmolLM2-135M: the whole pipeline on a real model."""

import copy
import gc

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache, pipeline

import kvmix_compile
from kvmix_compile import Importance, KVMixCache
from kvmix_compile.backend import packed_cache
from kvmix_compile.english import built_in_english
from tests.helpers.one_capture import analyzed, applied

LONG = 1500
WINDOW = 448
LAYERS = 4


@pytest.fixture(scope="module")
def text(smollm2) -> Tensor:
    _, tokenizer = smollm2
    return tokenizer("\n\n".join(built_in_english()), return_tensors="pt").input_ids[:, : LONG + 400]


@pytest.fixture(scope="module")
def importance(smollm2, text: Tensor) -> Importance:
    """From few tokens: enough for a plan, and quick."""
    return analyzed(smollm2[0], calibration=text[0, LONG:].view(2, 200)[:, :100])


@pytest.fixture(scope="module")
def quantized(smollm2, importance: Importance) -> PreTrainedModel:
    return applied(smollm2[0], plan=importance.allocate(budget=2.3))


def storages() -> dict[int, Tensor]:
    """A tensor of every storage that is alive in this process."""
    gc.collect()
    return {
        item.untyped_storage().data_ptr(): item
        for item in gc.get_objects()
        if type(item) is Tensor and item.device.type == "cpu"
    }


def test_at_16_bits_200_tokens_are_the_originals(smollm2, importance: Importance) -> None:
    model, tokenizer = smollm2
    lossless = applied(model, plan=importance.allocate(budget=16))
    prompt = tokenizer("Once upon a time, in a small village by the sea,", return_tensors="pt")
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": -1}
    text, length = lossless.generate(**prompt, **options), prompt["input_ids"].shape[1]
    assert text.shape[1] == length + 200
    with torch.no_grad():
        # In one go what the original would write next, wherever it is: at each token the one that is there.
        following = model(text).logits.argmax(-1)
    assert torch.equal(text[:, length:], following[:, length - 1 : -1])


def test_a_long_prompts_cache_is_as_small_as_predicted(quantized: PreTrainedModel, text: Tensor) -> None:
    """And nothing but the cache stays alive: no copy of it in the model's own dtype."""
    plan, before = quantized.kvmix_plan, storages()
    past = KVMixCache(quantized)
    quantized(text[:, :LONG], past_key_values=past, logits_to_keep=1)
    left = {pointer: tensor for pointer, tensor in storages().items() if pointer not in before}
    assert past.nbytes == plan.cache_bytes(LONG, 1, torch.float32)
    assert sum(tensor.untyped_storage().nbytes() for tensor in left.values()) == pytest.approx(past.nbytes, rel=1e-3)
    elements = LONG * sum(site.key_elements + site.value_elements for site in plan.sites)
    packed = sum(tensor.nbytes for tensor in past.tensors() if tensor.dtype == torch.uint8)
    assert past.nbytes < 0.4 * 4 * elements and 8 * packed / elements < 3.3
    assert plan.code_bits <= 2.3 and 2 < plan.storage_bits < 3


def test_a_fresh_prompts_logits_are_the_originals(smollm2, quantized: PreTrainedModel, text: Tensor) -> None:
    with torch.no_grad():
        expected = smollm2[0](text[:, :300]).logits
    torch.testing.assert_close(quantized(text[:, :300]).logits, expected, atol=1e-3, rtol=1e-4)


@pytest.fixture(scope="module")
def shortened(smollm2) -> PreTrainedModel:
    """The model without most of its layers: Dynamo traces each of them anew."""
    model = copy.deepcopy(smollm2[0])
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    return model


def test_both_ways_give_the_same_perplexity_and_bytes(shortened: PreTrainedModel, text: Tensor) -> None:
    """Of one plan; most of a window is read from what is packed."""
    torch._dynamo.reset()
    model, caches = shortened, list[StaticCache]()
    quantized = kvmix_compile.apply(model, budget=2.3, calibration=text[0, LONG:].view(2, 200))
    plan = quantized.kvmix_plan
    step = torch.compile(model, backend="kvmix", options={"plan": plan, "backend": "eager"})

    def new_cache() -> StaticCache:
        caches.append(StaticCache(model.config, max_cache_len=WINDOW))
        return caches[-1]

    ids = text[0, :WINDOW]
    found = kvmix_compile.perplexity(step, ids, window=WINDOW, new_cache=new_cache)
    assert found == pytest.approx(kvmix_compile.perplexity(quantized, ids, window=WINDOW), rel=2e-3)
    held = packed_cache(caches[0])
    assert held is not None and len(caches) == 1
    assert held.nbytes == pytest.approx(plan.cache_bytes(WINDOW, 1, torch.float32), rel=0.01)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passage: str) -> str:
    question = [{"role": "user", "content": f"{passage}\n\nWhat is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_speaks_sensibly_after_a_long_text(smollm2, quantized: PreTrainedModel, text: Tensor) -> None:
    tokenizer = smollm2[1]
    assert "Paris" in answer(quantized, tokenizer, tokenizer.decode(text[0, :600]))


def test_it_runs_in_a_pipeline(smollm2, quantized: PreTrainedModel) -> None:
    generate = pipeline("text-generation", model=quantized, tokenizer=smollm2[1])
    (result,) = generate("The capital of France is", max_new_tokens=4, do_sample=False)
    assert result["generated_text"].startswith("The capital of France is Paris")


def test_the_original_still_speaks(smollm2, quantized: PreTrainedModel) -> None:
    model, tokenizer = smollm2
    assert not hasattr(model, "kvmix_plan") and hasattr(quantized, "kvmix_plan")
    assert model.lm_head.weight is quantized.lm_head.weight
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(text[0]).startswith("The capital of France is Paris")
