"""The evaluation: what is compared, that it goes through the cache, and that its figures are what they say."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import kvmix_compile
from kvmix_compile.errors import BudgetError, InputError
from kvmix_compile.evaluate import baselines, comparison
from kvmix_compile.evaluate.baselines import Quantized, check_baselines, published_plans, quantized_caches
from kvmix_compile.evaluate.comparison import Result, compare
from kvmix_compile.evaluate.configurations import Compiled, Configuration, compile_plans, make_plans
from kvmix_compile.evaluate.divergence import Divergence, Predictions, Reference
from kvmix_compile.evaluate.held_out import held_out_english
from kvmix_compile.evaluate.passkey import INTRODUCTION, QUESTION, SENTENCE, Retrieval, hide_passkeys, retrieve
from kvmix_compile.evaluate.perplexity import windowed
from kvmix_compile.evaluate.plots import check_plots, plot_divergence, plot_frontier, plot_layers
from kvmix_compile.evaluate.written import written_text
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.plain import hand_written
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.measure.importance import Importance
from tests.helpers.one_capture import applied, zoo

SINKS, RECENT = 32, 32
TEXT = "the quick brown fox jumps over the lazy dog. " * 4


def ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def importance(model: PreTrainedModel) -> Importance:
    return kvmix_compile.analyze(model, calibration=ids(300, seed=1), sinks=SINKS, recent=RECENT)


@pytest.fixture(scope="module")
def configurations(model: PreTrainedModel, importance: Importance) -> list[Configuration]:
    plans, _ = make_plans(importance, ["fisher"], [2.0, 16.0], [])
    return [Configuration("original", model), *compile_plans(model, plans)]


# Windows and chunks


@pytest.mark.parametrize(("tokens", "windows"), [(100, [100]), (128, [128]), (200, [128, 72]), (140, [128])])
def test_every_window_is_more_than_a_chunk(tokens: int, windows: list[int]) -> None:
    chunks = windowed(ids(tokens), chunk=32, window=128)
    lengths = []
    for chunk in chunks:
        lengths.append(0) if chunk.opens_window else None
        lengths[-1] += chunk.given.numel()
    assert lengths == windows
    assert sum(chunk.closes_window for chunk in chunks) == len(windows)
    assert max(chunk.given.numel() for chunk in chunks) <= 32


def test_every_token_but_the_first_of_a_window_is_predicted_once() -> None:
    text = ids(200)
    predicted = torch.cat([chunk.targets for chunk in windowed(text, chunk=32, window=128)])
    assert torch.equal(predicted, torch.cat([text[1:128], text[129:]]))


@pytest.mark.parametrize(
    ("tokens", "chunk", "window", "message"),
    [
        (1, 8, 16, "at least two tokens"),
        (100, 16, 16, "never read"),
        (100, 0, 16, "smaller than window"),
        (16, 16, 64, "never read"),
    ],
)
def test_a_text_that_would_bypass_the_cache_is_refused(tokens: int, chunk: int, window: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        windowed(ids(tokens), chunk, window)


# Comparison


def one_shot(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Log-probabilities `[tokens - 1, vocabulary]` of an unquantized model, which needs no cache."""
    with torch.no_grad():
        return model(input_ids=window[None]).logits[0, :-1].float().log_softmax(-1)


def test_the_original_and_a_lossless_plan_agree(configurations: list[Configuration], model: PreTrainedModel) -> None:
    text = ids(320)
    original, _, lossless = compare(configurations, text, chunk=32, window=160)
    expected = [F.nll_loss(one_shot(model, part), part[1:]).item() for part in text.split(160)]
    assert original.perplexity == pytest.approx(math.exp(sum(expected) / 2), rel=1e-4)
    assert (original.divergence.largest, original.agreement, original.probability_change) == (0.0, 1.0, 0.0)
    assert lossless.perplexity == pytest.approx(original.perplexity, rel=1e-4)
    assert lossless.divergence.mean < 1e-6
    assert lossless.divergence.largest < 1e-5
    assert lossless.agreement > 0.99


def test_figures_are_those_of_each_configuration_by_itself(configurations: list[Configuration]) -> None:
    text = ids(400)
    _, two_bits, _ = compare(configurations, text, chunk=32, window=200)
    alone = kvmix_compile.perplexity(configurations[1].model, text, chunk=32, window=200)
    assert two_bits.perplexity == pytest.approx(alone)
    assert two_bits.divergence.mean > 0.01
    assert two_bits.agreement < 1.0


def test_divergence_and_agreement_follow_their_definitions(model: PreTrainedModel) -> None:
    """Against another model, both unquantized: what the figures must be is then known without a cache."""
    other, text = tiny("llama", seed=1), ids(150)
    _, compared = compare([Configuration("original", model), Configuration("other", other)], text, chunk=32)
    p, q = one_shot(model, text), one_shot(other, text)
    each = (p.exp() * (p - q)).sum(-1)
    found = compared.divergence
    assert found.mean == pytest.approx(each.mean().item(), rel=1e-3)
    assert (found.median, found.largest) == pytest.approx((each.median().item(), each.max().item()), rel=1e-3)
    assert [found.worst_percent, found.worst_permille] == pytest.approx(
        each.quantile(torch.tensor([0.99, 0.999])).tolist(), rel=1e-3
    )
    change = (p - q).new_tensor([(p[at, token].exp() - q[at, token].exp()) for at, token in enumerate(text[1:])])
    assert compared.probability_change == pytest.approx(change.square().mean().sqrt().item(), rel=1e-3)
    assert compared.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


def test_divergence_is_told_along_the_window(model: PreTrainedModel) -> None:
    """Of windows of different lengths: the bins are of positions in them."""
    other, text = tiny("llama", seed=1), ids(700)
    _, compared = compare([Configuration("original", model), Configuration("other", other)], text, chunk=32, window=400)
    windows = [
        (p.exp() * (p - q)).sum(-1)
        for p, q in ((one_shot(model, part), one_shot(other, part)) for part in text.split(400))
    ]
    expected = [torch.cat([part[begin : begin + 256] for part in windows]).mean().item() for begin in (0, 256)]
    assert compared.divergence.by_position == pytest.approx(expected, rel=1e-3)


def test_what_is_kept_of_predictions_has_its_place_before_the_first_logits() -> None:
    """Small tensors that stay, made between large ones that go, would leave gaps too small for the next large ones."""
    predictions, logits = Predictions(30), torch.randn(10, 64)
    kept = {name: item.data_ptr() for name, item in vars(predictions).items() if isinstance(item, Tensor)}
    for position in (0, 10, 20):
        predictions.add(logits + 1, Reference.of(logits), torch.arange(10), position)
    after = {name: item.data_ptr() for name, item in vars(predictions).items() if isinstance(item, Tensor)}
    assert after == kept
    assert not any(isinstance(item, list | dict) for item in vars(predictions).values())
    assert predictions.perplexity == pytest.approx(F.cross_entropy(logits, torch.arange(10)).exp().item())


def test_bits_are_the_plans_and_the_caches(configurations: list[Configuration]) -> None:
    original, two_bits, _ = compare(configurations, ids(400), chunk=32, window=300)
    plan = configurations[1].plan
    assert (original.code_bits, original.stored_bits, original.held_bits) == (16, 16, 16)
    assert (two_bits.code_bits, two_bits.stored_bits) == (plan.code_bits, plan.storage_bits)
    elements = 300 * sum(site.key_elements + site.value_elements for site in plan.sites)
    assert two_bits.held_bits == 8 * plan.cache_bytes(300, dtype=torch.bfloat16) / elements
    assert two_bits.stored_bits < two_bits.held_bits < 16


def test_bits_held_are_of_what_a_window_still_sees() -> None:
    model = zoo("mistral")
    lossless = Compiled("lossless", applied(model, budget=16, sinks=SINKS, recent=RECENT))
    _, everything = compare([Configuration("original", model), lossless], ids(200), chunk=32, window=200)
    assert everything.held_bits >= 16


def test_the_originals_logits_are_computed_once_and_no_window_at_once(
    configurations: list[Configuration], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_by = comparison.read

    def listening(reader: nn.Module, given: Tensor, cache: Any, **options: Any) -> Tensor:
        read.extend([given.numel()] if reader is model else [])
        return read_by(reader, given, cache, **options)

    monkeypatch.setattr(comparison, "read", listening)
    compare(configurations, ids(200), chunk=32)
    assert read == [32] * 6 + [8]


def test_a_text_too_short_to_quantize_anything_is_refused(configurations: list[Configuration]) -> None:
    with pytest.raises(InputError, match="nothing would be measured"):
        compare(configurations, ids(SINKS + RECENT + 32), chunk=32)


# Configurations and baselines


def test_a_plan_for_each_policy_and_budget(importance: Importance) -> None:
    plans, left_out = make_plans(importance, ["fisher", "uniform"], [2.0, 3.0], [4.0])
    assert list(plans) == [
        f"{policy}, {budget}"
        for policy in ("fisher", "uniform")
        for budget in ("budget 2", "budget 3", "storage budget 4")
    ]
    assert not left_out


def test_what_a_policy_cannot_meet_is_left_out_and_said(importance: Importance) -> None:
    plans, left_out = make_plans(importance, ["fisher", "kvmix"], [8.0], [])
    assert list(plans) == ["fisher, budget 8"]
    assert "kvmix, budget 8 is left out" in left_out[0]
    with pytest.raises(BudgetError, match="kvmix, budget 8"):
        make_plans(importance, ["kvmix"], [8.0], [])


def test_published_recipes(importance: Importance) -> None:
    wide = replace(importance, sites=importance.sites * 5)  # ten layers: the paper's 20% are two
    plans = published_plans(["kivi", "kvmix-paper", "quanto-2"], wide)
    kivi, paper = plans["kivi"], plans["kvmix-paper"]
    assert {(site.key.bits, site.value.bits, site.key.group) for site in kivi.sites} == {(2, 2, 32)}
    assert (kivi.sinks, kivi.recent, kivi.storage_bits) == (0, 128, 3.0)
    assert sorted(site.key.bits for site in paper.sites) == [2] * 8 + [3] * 2
    assert sorted(site.value.bits for site in paper.sites) == [2] * 8 + [4] * 2
    assert (paper.sinks, paper.code_bits) == (0, 2.3)


class _HalfFull:
    """A QuantizedCache of 100 tokens, 20 of which wait to be quantized."""

    def __init__(self, waiting: Tensor) -> None:
        self.layers = [type("Layer", (), {"keys": waiting})]

    def get_seq_length(self) -> int:
        return 100


def test_bits_of_a_quantized_cache(model: PreTrainedModel) -> None:
    quantized = Quantized("quanto-2", model, "quanto", 2)
    assert (quantized.code_bits, quantized.stored_bits) == (2, 2.5)
    assert quantized.held_bits(_HalfFull(torch.zeros(1, 2, 20, 32))) == pytest.approx(0.2 * 16 + 0.8 * 2.5)
    assert quantized.held_bits(_HalfFull(torch.tensor([]))) == pytest.approx(2.5)


@pytest.mark.parametrize("name", list(baselines.QUANTIZED))
def test_quantized_caches_of_transformers(name: str, model: PreTrainedModel) -> None:
    backend, bits = baselines.QUANTIZED[name]
    pytest.importorskip(baselines.PACKAGES[backend][0])
    check_baselines([name], model)
    text = ids(300)
    original, quantized = compare([Configuration("original", model), *quantized_caches([name], model)], text)
    assert quantized.code_bits == bits
    assert quantized.stored_bits <= quantized.held_bits < 16
    assert quantized.divergence.mean > 0
    assert quantized.perplexity != original.perplexity


def test_baselines_that_cannot_be_had(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no baseline kivi-3; choose from kivi, kvmix-paper, q4_0-hadamard"):
        check_baselines(["kivi-3"], model)
    with pytest.raises(InputError, match="is no model of it"):
        check_baselines(["quanto-4"], hand_written())
    monkeypatch.setattr(baselines, "_installed", lambda module: False)
    with pytest.raises(InputError, match=r"needs hqq, which is not installed. Run: pip install"):
        check_baselines(["hqq-2"], model)


def test_a_sliding_window_has_no_quantized_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_installed", lambda module: True)
    with pytest.raises(InputError, match="cannot be had for Gemma2ForCausalLM"):
        check_baselines(["quanto-4"], tiny("gemma2"))


# What the original writes


def test_the_original_writes_texts_of_its_own(model: PreTrainedModel) -> None:
    """Sampled after the first words, and the same each time."""
    tokenizer = character_tokenizer()
    text, again = (written_text(model, tokenizer, 100) for _ in range(2))
    first, second = text.view(2, 100)
    assert torch.equal(text, again) and not torch.equal(first, second)
    for passage, part in zip(held_out_english(), (first, second), strict=False):
        assert tokenizer.decode(part).startswith(passage[:32])
    with pytest.raises(InputError, match="decode more than 32"):
        written_text(model, tokenizer, 32)


def test_a_text_is_read_token_by_token(configurations: list[Configuration], model: PreTrainedModel) -> None:
    """As one that is decoded: what is read of a token by the next one is stored."""
    text = written_text(model, character_tokenizer(), 300)
    two_bits = compare(configurations, text, chunk=1, window=300)[1]
    assert two_bits.perplexity == pytest.approx(
        kvmix_compile.perplexity(configurations[1].model, text, chunk=1, window=300)
    )
    assert len(two_bits.divergence.by_position) == 2


# Passkeys


def test_a_passkey_is_where_it_should_be() -> None:
    tokenizer = character_tokenizer()
    passkeys = hide_passkeys(tokenizer, [300, 700], [0.0, 0.5, 1.0])
    assert [passkey.text.numel() for passkey in passkeys] == [300] * 3 + [700] * 3
    assert len({passkey.key for passkey in passkeys}) == 6
    for passkey in passkeys:
        text = tokenizer.decode(passkey.text).removeprefix(INTRODUCTION)
        sentence = SENTENCE.format(key=passkey.key)
        assert text.index(sentence) == round(passkey.depth * (len(text) - len(sentence)))


def test_the_same_passkeys_every_time() -> None:
    first, second = (hide_passkeys(character_tokenizer(), [300], [0.2, 0.8]) for _ in range(2))
    assert [passkey.key for passkey in first] == [passkey.key for passkey in second]


@pytest.mark.parametrize(
    ("length", "depth", "message"), [(300, 1.5, "from 0"), (300, -0.1, "from 0"), (200, 0.5, "200 tokens is too short")]
)
def test_impossible_passkeys(length: int, depth: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hide_passkeys(character_tokenizer(), [length], [depth])


def test_the_answer_is_greedy_and_its_text_from_the_cache(configurations: list[Configuration]) -> None:
    """What a model answers is what greedy decoding of text and question answers; a tiny model knows no key."""
    tokenizer = character_tokenizer()
    (passkey,) = hide_passkeys(tokenizer, [300], [0.5])
    original, two_bits, lossless = retrieve(configurations, tokenizer, [passkey])
    question = torch.tensor(tokenizer.encode(QUESTION, add_special_tokens=False))
    prompt = torch.cat([passkey.text, question])[None]
    expected = configurations[0].model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert original.answer == lossless.answer == tokenizer.decode(expected[0, prompt.shape[1] :])
    assert [retrieval.configuration for retrieval in (original, two_bits)] == ["original", "fisher, budget 2"]
    assert not original.retrieved


@pytest.mark.parametrize(
    ("answer", "retrieved"),
    [(" 12345", True), ("12345.", True), ("\n12345", True), (" 1234", False), (" 54321", False)],
)
def test_a_key_is_retrieved_where_the_answer_begins_with_it(answer: str, retrieved: bool) -> None:
    assert Retrieval("original", 100, 0.5, "12345", answer).retrieved == retrieved


def test_a_passkey_beyond_the_models_positions(configurations: list[Configuration]) -> None:
    tokenizer = character_tokenizer()
    with pytest.raises(InputError, match="the model has 512 positions"):
        retrieve(configurations, tokenizer, hide_passkeys(tokenizer, [500], [0.5]))


# Plots


def result(name: str, stored_bits: float, perplexity: float) -> Result:
    return Result(
        configuration=name,
        code_bits=stored_bits,
        stored_bits=stored_bits,
        held_bits=stored_bits,
        perplexity=perplexity,
        divergence=Divergence(0.1, 0.0, 0.5, 1.0, 2.0, (0.1, 0.2)),
        agreement=0.9,
        probability_change=0.1,
    )


def test_plots_are_pictures(importance: Importance, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    check_plots(tmp_path / "new")
    results = [
        result("original", 16, 20), result("fisher, budget 2", 2.3, 22), result("fisher, budget 3", 3.3, 20.5),
        result("fisher, budget 2, exact chunks", 2.3, 23), result("quanto-2", 2.5, 240),
    ]  # fmt: skip
    plot_frontier({"a text": results, "another": results}, tmp_path / "frontier.png")
    # Where there is no projection there is no norm.
    unknown = replace(importance.sites[0], key_gradient_norm=math.nan, value_gradient_norm=0.0)
    plans, _ = make_plans(importance, ["fisher"], [2.3, 16.0], [])
    plot_layers(replace(importance, sites=(unknown, *importance.sites[1:])), plans, tmp_path / "layers.png")
    plot_divergence({"a text": results, "another": results}, tmp_path / "divergence.png")
    for name in ("frontier.png", "layers.png", "divergence.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmix_compile.evaluate.plots.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Run: pip install 'kvmix-compile\[plots\]'"):
        check_plots(tmp_path)
