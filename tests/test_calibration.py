"""Calibration data: what each kind of input becomes, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from kvmix_compile.calibration import Calibration, CalibrationError, build_calibration
from kvmix_compile.english import built_in_english
from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import MAX_POSITIONS, VOCABULARY, tiny


class LetterTokenizer:
    """One token a character, as a transformers tokenizer would; with or without a token that starts every text."""

    eos_token_id = 2

    def __init__(self, bos_token_id: int | None = None) -> None:
        self.bos_token_id = bos_token_id

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return start + [min(ord(letter), VOCABULARY - 1) for letter in text]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


def shapes(calibration: Calibration) -> list[tuple[int, ...]]:
    return [tuple(batch.shape) for batch in calibration.batches]


def test_built_in_english_is_prose_and_always_the_same() -> None:
    passages = built_in_english()
    assert passages == built_in_english()
    assert len(set(passages)) == len(passages) > 20
    assert all(len(passage) > 1000 and "::=" not in passage and passage.endswith(".") for passage in passages)


def test_a_tokenizer_alone_gives_built_in_english(model: nn.Module) -> None:
    calibration = build_calibration(model, LetterTokenizer())
    assert shapes(calibration) == [(8, 512)]
    assert calibration.batches[0].dtype == torch.int64
    assert calibration.source == "built-in English (pydoc_data.topics): 4096 tokens in 8 rows of 512"


def test_built_in_english_is_what_smollm2_expects(smollm2) -> None:
    model, tokenizer = smollm2
    (batch,) = build_calibration(model, tokenizer, tokens=512).batches
    with torch.no_grad():
        assert model(batch, labels=batch).loss.exp() < 40


def test_texts_are_joined_by_the_end_token(model: nn.Module) -> None:
    (batch,) = build_calibration(model, LetterTokenizer(), ["A" * 40, "", "B" * 40]).batches
    assert batch.tolist() == [[65] * 40 + [2] + [66] * 40]


def test_every_row_of_texts_starts_as_the_tokenizer_starts_a_text(model: nn.Module) -> None:
    (batch,) = build_calibration(model, LetterTokenizer(bos_token_id=1), ["A" * 126], length=64).batches
    assert batch.tolist() == [[1] + [65] * 63] * 2


def test_one_text_need_not_be_in_a_list(model: nn.Module) -> None:
    assert shapes(build_calibration(model, LetterTokenizer(), "A" * 50)) == [(1, 50)]


def test_remainders_are_rows_of_their_own_unless_too_short(model: nn.Module) -> None:
    ids = torch.arange(3, 103)
    assert shapes(build_calibration(model, calibration=ids, length=64)) == [(1, 64), (1, 36)]
    assert shapes(build_calibration(model, calibration=ids, length=48)) == [(2, 48)]
    assert shapes(build_calibration(model, calibration=ids[:10], length=64)) == [(1, 10)]


def test_rows_of_ids_stay_rows(model: nn.Module) -> None:
    ids = torch.randint(3, VOCABULARY, (3, 40))
    for given in (ids, list(ids), ids.tolist(), ids.int()):
        (batch,) = build_calibration(model, calibration=given).batches
        assert torch.equal(batch, ids)


def test_short_sequences_of_ids_are_joined(model: nn.Module) -> None:
    (batch,) = build_calibration(model, calibration=[[5] * 20, [6] * 20]).batches
    assert batch.tolist() == [[5] * 20 + [2] + [6] * 20]


def test_no_more_tokens_than_asked_for(model: nn.Module) -> None:
    calibration = build_calibration(model, calibration=torch.full((10, 100), 7), tokens=250)
    assert shapes(calibration) == [(2, 100), (1, 50)]
    assert calibration.tokens == 250
    assert calibration.source == "the token ids given: 250 tokens in 3 rows of 50 to 100"
    assert [len(row) for row in calibration.rows] == [100, 100, 50]


def test_rows_fit_the_models_positions(model: nn.Module) -> None:
    calibration = build_calibration(model, calibration=torch.full((1500,), 7), length=4096)
    assert shapes(calibration)[0] == (2, MAX_POSITIONS)


@pytest.mark.parametrize("build", [lambda: tiny("llama"), lambda: tiny("gpt2"), plain.hand_written, plain.fused_arange])
def test_without_a_tokenizer_the_model_writes_its_own(build) -> None:
    model, state = build(), torch.get_rng_state()
    calibration = build_calibration(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert shapes(calibration) == [(4, 128)]
    assert "sampled from the model itself" in calibration.source
    assert torch.equal(calibration.batches[0], build_calibration(model).batches[0])
    assert len({tuple(row.tolist()) for row in calibration.rows}) == 4


def test_samples_come_from_the_models_distribution(model: nn.Module) -> None:
    (batch,) = build_calibration(model).batches
    with torch.no_grad():
        written = model(batch, labels=batch).loss
        random = torch.randint(VOCABULARY, batch.shape)
        assert written < model(random, labels=random).loss - 1


def test_the_models_mode_is_left_alone() -> None:
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    build_calibration(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "fewer than 2 tokens"),
        ([""], "fewer than 2 tokens"),
        (["A"], "fewer than 2 tokens"),
        (torch.empty(0, dtype=torch.int64), "fewer than 2 tokens"),
        ([[]], "fewer than 2 tokens"),
        (torch.tensor([5]), "fewer than 2 tokens"),
        (torch.tensor([5, VOCABULARY]), f"token id {VOCABULARY} is outside the model's vocabulary"),
        (torch.tensor([5, -100]), "token id -100 is outside"),
        (torch.rand(40), "must be integers"),
        (torch.ones(2, 3, 4, dtype=torch.int64), r"must be \[tokens\] or \[rows, tokens\]"),
        (["A" * 40, [5] * 40], "mixes texts with list"),
        ([[5, None]], "cannot read token ids"),
        ({"input_ids": [5] * 40}, "cannot calibrate on a dict"),
    ],
)
def test_unusable_data_is_refused(model: nn.Module, calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        build_calibration(model, LetterTokenizer(), calibration)


def test_texts_need_a_tokenizer(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="pass tokenizer="):
        build_calibration(model, calibration=["some text"])


def test_a_plain_models_vocabulary_is_known() -> None:
    with pytest.raises(CalibrationError, match="vocabulary of 128"):
        build_calibration(plain.fused_arange(), calibration=torch.tensor([5, 128]))


def test_a_model_that_gives_no_numbers_cannot_write() -> None:
    model = plain.hand_written()
    nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(CalibrationError, match="not finite"):
        build_calibration(model)
