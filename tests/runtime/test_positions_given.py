"""What a call's positions and masks say is what they say to the original: for every architecture, in any chunks."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.errors import CacheError, InputError
from kvmix_compile.models_zoo.seeding import seeded
from kvmix_compile.models_zoo.tiny import TINY, TINY_SPECIAL
from tests.helpers.cache_argument import with_cache
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import ids, lossless, original, quantized

# Those that count positions in every row alike, and of which the distance of two tokens is felt beside positions.
NO_PADDING = ("llama4",)
MEASURED = ("mistral", "gemma2", "gemma3", "gpt_oss", "bloom", "mpt", "falcon_alibi", *NO_PADDING)

CHUNKS = (30, 1, 1, 1, 12)
TOKENS = sum(CHUNKS)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A tiny model and its twin that quantizes nothing."""
    model = zoo(name)
    return model, applied(model, budget=16, sinks=4, recent=32, calibration=ids(1, 64))


def left() -> Tensor:
    return (torch.arange(TOKENS) >= torch.tensor([[0], [7], [31]])).long()


def right() -> Tensor:
    return left().flip(1)


def enclosed() -> Tensor:
    """Within a chunk, at its beginning and its end, and as whole steps of decoding."""
    mask = left()
    mask[0, [5, 6, 29, 31, 44]] = 0
    mask[1, 30:33] = 0
    return mask


MASKS: dict[str, Callable[[], Tensor]] = {"left": left, "right": right, "enclosed": enclosed}


def by_generate(mask: Tensor) -> Tensor:
    """The positions that transformers' generate makes of a mask."""
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)


@torch.no_grad()
def run(model: nn.Module, past: Any, text: Tensor, chunks: Sequence[int] = CHUNKS, **whole: Tensor) -> Tensor:
    """Logits of a text in chunks; `whole`: a mask, which grows with what was given, and positions of each token."""
    logits, seen = [], 0
    for chunk in chunks:
        part, seen = slice(seen, seen + chunk), seen + chunk
        options = {
            name: given[:, :seen] if name == "attention_mask" else given[:, part] for name, given in whole.items()
        }
        logits.append(model(text[:, part], **options, **with_cache(past)).logits)
    return torch.cat(logits, 1)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# Masks


@pytest.mark.parametrize("name", [*TINY, *TINY_SPECIAL])
def test_padding_is_the_originals_or_refused(name: str) -> None:
    model, twin = pair(name)
    text = ids(3, TOKENS)
    for kind, make in MASKS.items():
        mask = make()
        ways = [{}, {"position_ids": by_generate(mask)}] if twin.kvmix_program.numbering.is_input else [{}]
        for positions in ways:
            past = KVMixCache(twin)
            if name in NO_PADDING or (kind == "enclosed" and name in MEASURED):
                with pytest.raises(InputError):
                    run(twin, past, text, attention_mask=mask, **positions)
                assert not past.is_initialized
                continue
            expected = run(model, DynamicCache(config=model.config), text, attention_mask=mask, **positions)
            actual = run(twin, past, text, attention_mask=mask, **positions)
            assert_close(actual[mask.bool()], expected[mask.bool()])
            assert past.lengths.tolist() == mask.sum(1).tolist() and past.seen == TOKENS


def test_learned_positions_count_padding_and_those_of_a_mask_do_not() -> None:
    assert pair("gpt2")[1].kvmix_program.numbering.padded == "slots"
    assert pair("opt")[1].kvmix_program.numbering.padded == "tokens"


@pytest.mark.parametrize("name", ["mistral", "mpt"])
def test_where_distance_counts_a_row_that_ended_in_padding_cannot_go_on(name: str) -> None:
    twin = pair(name)[1]
    mask = torch.ones(2, 32, dtype=torch.int64)
    mask[0, 25:30] = 0
    past = KVMixCache(twin)
    twin(ids(2, 30), attention_mask=mask[:, :30], cache=past)
    with pytest.raises(InputError, match="how far apart"):
        twin(ids(2, 2), attention_mask=mask, cache=past)
    assert past.seen == 30
    mask[0, 30:] = 0  # that row is done, and the other goes on
    assert twin(ids(2, 2), attention_mask=mask, cache=past).logits.shape == (2, 2, 128)
    assert past.lengths.tolist() == [25, 32]


@pytest.mark.parametrize("kept", [torch.tensor([3, 17, 24]), torch.tensor([-30, 0]), torch.arange(3, 9)])
def test_logits_are_kept_by_their_place_in_the_text(kept: Tensor) -> None:
    text, mask = ids(3, TOKENS), enclosed()
    every = lossless()(text, attention_mask=mask).logits[:, kept]
    real = mask.bool()[:, kept]
    assert_close(lossless()(text, attention_mask=mask, logits_to_keep=kept).logits[real], every[real])


def test_what_follows_padding_is_not_made_up() -> None:
    text, mask = ids(3, TOKENS), right()
    with pytest.raises(InputError, match="after the last token"):
        lossless()(text, attention_mask=mask, logits_to_keep=1)
    last = lossless()(text, attention_mask=mask.flip(1), logits_to_keep=1).logits
    assert last.shape == (3, 1, 128)


def test_the_loss_of_right_padded_rows_is_the_originals() -> None:
    text, mask = ids(3, TOKENS), right()
    labels = text.masked_fill(mask == 0, -100)
    options = {"attention_mask": mask, "labels": labels}
    with torch.no_grad():
        assert_close(lossless()(text, **options).loss, original()(text, **options).loss)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5, dtype=torch.int64)])
def test_the_mask_of_earlier_calls_is_kept(mask: Tensor | None) -> None:
    """Without it the original attends to its padding, which is not stored here."""
    earlier = torch.ones(2, 20, dtype=torch.int64)
    earlier[1, :6] = 0
    past = KVMixCache(quantized())
    quantized()(ids(2, 20), attention_mask=earlier, cache=past)
    with pytest.raises(CacheError, match="(that|those) of earlier calls"):
        quantized()(ids(2, 5), attention_mask=mask, cache=past)
    past.batch_select_indices(torch.tensor([0, 0]))
    if mask is None:
        assert quantized()(ids(2, 5), cache=past).logits.shape == (2, 5, 128)


@pytest.mark.parametrize("mask", [{"full_attention": None}, [[1] * 20] * 2, torch.zeros(2, 1, 20, 20)])
def test_a_mask_of_another_kind_is_refused(mask: Any) -> None:
    with pytest.raises(CacheError, match=r"must be \[batch, tokens\]"):
        quantized()(ids(2, 20), attention_mask=mask)


# The pad id inside a text, where generate makes a mask of it


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generate_takes_the_pad_id_in_a_text_as_with_the_original(name: str) -> None:
    model, twin = pair(name)
    text = ids(2, 60)
    text[0, 20], text[1, :9], text[1, 30:33] = 0, 0, 0
    options = {**GREEDY, "pad_token_id": 0}
    assert torch.equal(twin.generate(text, **options), model.generate(text, **options))


@pytest.mark.parametrize(("name", "slot"), [("mistral", 20), ("llama", 59), ("mistral", 59)])
def test_where_it_cannot_the_refusal_says_who_made_the_mask(name: str, slot: int) -> None:
    twin, text = pair(name)[1], ids(1, 60)
    text[0, slot] = 0
    with pytest.raises(InputError, match=r"pad_token_id.*torch\.ones_like\(input_ids\)"):
        twin.generate(text, **GREEDY, pad_token_id=0)


# Positions


def restarting() -> Tensor:
    return torch.cat([torch.arange(20), torch.arange(TOKENS - 20)])[None]


PATTERNS: dict[str, Tensor] = {
    "offset": torch.arange(TOKENS)[None] + 100,
    "begin anew": restarting(),
    "jump": torch.arange(TOKENS)[None] + 40 * (torch.arange(TOKENS) > 25),
    "backwards": torch.arange(TOKENS).flip(0)[None],
    "all the same": torch.full((1, TOKENS), 7),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon_alibi", "mistral"])
def test_positions_are_the_originals_or_refused(name: str, pattern: str) -> None:
    """Without a cache and a mask the original takes positions that do not follow each other for several texts."""
    model, twin = pair(name)
    text, options = ids(2, TOKENS), {"position_ids": PATTERNS[pattern]}
    with torch.no_grad():
        for more in ({}, {"attention_mask": torch.ones_like(text)}, {"use_cache": True}):
            assert_close(twin(text, **options, **more).logits, model(text, **options, **more).logits)
        alone = {**options, "use_cache": False}
        if pattern == "offset":
            assert_close(twin(text, **alone).logits, model(text, **alone).logits)
        else:
            with pytest.raises(InputError, match="a row of its own"):
                twin(text, **alone)
    expected = run(model, DynamicCache(config=model.config), text, position_ids=PATTERNS[pattern].expand(2, -1))
    assert_close(run(twin, KVMixCache(twin), text, position_ids=PATTERNS[pattern].expand(2, -1)), expected)


def test_a_model_without_a_mask_of_its_own_is_given_one_text_in_a_row() -> None:
    twin = applied(zoo("hand_written"), budget=16, calibration=ids(1, 64), sinks=0, recent=32)
    assert twin(ids(1, TOKENS), position_ids=PATTERNS["offset"]).shape == (1, TOKENS, 128)
    for options in ({}, {"use_cache": True}, {"attention_mask": torch.ones(1, TOKENS)}):
        with pytest.raises(InputError, match="a row of its own"):
            twin(ids(1, TOKENS), position_ids=restarting(), **options)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "max_length_k", "seq_idx"])
def test_other_ways_to_put_several_texts_into_a_row_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} puts several texts into a row"):
        quantized()(ids(1, 20), **{name: torch.tensor([0, 12, 20])})


WRONG: dict[str, tuple[Any, str]] = {
    "negative": (torch.arange(20)[None] - 1, "negative"),
    "beyond the last": (torch.arange(20)[None] + 500, "up to 519.*from 0 to 511"),
    "of another length": (torch.arange(19)[None], r"must be \[batch, tokens\]"),
    "of another batch": (torch.arange(20).expand(3, -1), r"must be \[batch, tokens\]"),
    "of three axes": (torch.arange(20).expand(3, 2, -1), r"must be \[batch, tokens\]"),
    "floats": (torch.arange(20.0)[None], "must be int64"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_positions_are_refused(what: str) -> None:
    positions, message = WRONG[what]
    past = KVMixCache(quantized())
    with pytest.raises(InputError, match=message):
        quantized()(ids(2, 20), position_ids=positions, cache=past)
    assert not past.is_initialized


def test_what_padding_is_numbered_means_nothing() -> None:
    text, mask = ids(3, TOKENS), left()
    positions = mask.cumsum(1) - 1
    expected = lossless()(text, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
    assert torch.equal(lossless()(text, attention_mask=mask, position_ids=positions).logits, expected)


def test_a_model_that_takes_no_positions_is_given_none() -> None:
    with pytest.raises(InputError, match="takes no position_ids"):
        pair("bloom")[1](ids(1, 9), position_ids=torch.arange(9)[None])


# Models that number by rules of their own


class Learned(nn.Module):
    """One layer, whose positions are what `number(input_ids, attention_mask)` says where it is given none."""

    def __init__(self, number: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.number = number
        self.tokens, self.learned, self.head = nn.Embedding(128, 32), nn.Embedding(128, 32), nn.Linear(32, 128)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if position_ids is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            position_ids = self.number(input_ids, mask)
        hidden = (self.tokens(input_ids) + self.learned(position_ids)).unflatten(-1, (4, 8)).transpose(1, 2)
        allowed = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        if attention_mask is not None:
            allowed = allowed & (attention_mask[:, None, None] != 0)
        return self.head(F.scaled_dot_product_attention(hidden, hidden, hidden, allowed).transpose(1, 2).flatten(2))


def learned(number: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, nn.Module]:
    with seeded(0):
        model = Learned(number).eval()
    return model, kvmix_compile.apply(model, budget=16, calibration=ids(1, 64), sinks=0, recent=32)


def test_a_model_of_ones_own_numbers_padding_as_it_does() -> None:
    text, mask = ids(3, TOKENS), left()
    for number in (
        lambda text, mask: torch.arange(text.shape[1]).expand_as(text),
        lambda text, mask: (mask.cumsum(1) - 1).clamp(min=0),
    ):
        model, twin = learned(number)
        with torch.no_grad():
            expected = model(text, mask)
        assert_close(twin(text, mask)[mask.bool()], expected[mask.bool()])


def test_a_numbering_that_is_not_understood_has_to_be_given() -> None:
    model, twin = learned(lambda text, mask: torch.arange(text.shape[1]).expand_as(text) + 2 * mask[:, :1] + 3)
    text, positions = ids(2, TOKENS), torch.arange(TOKENS)[None] + 5
    with pytest.raises(InputError, match="pass position_ids"):
        twin(text)
    with torch.no_grad():
        assert_close(twin(text, position_ids=positions), model(text))
    model, twin = learned(lambda text, mask: torch.arange(text.shape[1]).expand_as(text) + 2 - 2 * mask[:, :1])
    assert twin(text).shape == (2, TOKENS, 128)
    with pytest.raises(InputError, match="pass position_ids"):
        twin(ids(3, TOKENS), left())


def test_a_model_that_counts_every_place_itself_is_padded_on_the_left() -> None:
    config = AutoConfig.for_model(
        "bart", vocab_size=128, d_model=64, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64,
        max_position_embeddings=128, init_std=0.3, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config).eval()
    twin, text = kvmix_compile.apply(model, budget=16, calibration=ids(1, 64)), ids(3, TOKENS)
    expected = run(model, DynamicCache(config=config), text, attention_mask=left())[left().bool()]
    assert_close(run(twin, KVMixCache(twin), text, attention_mask=left())[left().bool()], expected)
    for mask in (right(), enclosed()):
        with pytest.raises(InputError, match="pad on the left, or pass rows of equal length"):
            twin(text, attention_mask=mask)


# A twin's forward is called as the original's is


def test_arguments_in_order_are_the_originals() -> None:
    model, twin = pair("gpt2")
    text, mask = ids(3, TOKENS), left()
    with torch.no_grad():
        assert_close(twin(text, None, mask).logits[mask.bool()], model(text, None, mask).logits[mask.bool()])
    with pytest.raises(TypeError, match="multiple values"):
        twin(text, input_ids=text)


@cache
def bert() -> tuple[nn.Module, nn.Module]:
    config = AutoConfig.for_model(
        "bert", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        is_decoder=True, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config).eval()
    return model, kvmix_compile.apply(model, budget=16, calibration=ids(1, 64))


def test_token_types_of_zero_are_taken_where_they_change_nothing() -> None:
    model, twin = bert()
    text, types = ids(2, 20), torch.zeros(2, 20, dtype=torch.int64)
    assert torch.equal(
        twin.generate(text, token_type_ids=types, **GREEDY), model.generate(text, token_type_ids=types, **GREEDY)
    )


def test_token_types_that_mean_something_are_heard() -> None:
    types = torch.zeros(1, 20, dtype=torch.int64)
    for (model, twin), given in ((bert(), types + 1), (pair("gpt2"), types + 5)):
        text = ids(1, 20)
        assert torch.equal(
            twin.generate(text, token_type_ids=given, **GREEDY), model.generate(text, token_type_ids=given, **GREEDY)
        )
        with torch.no_grad():
            assert_close(twin(text, token_type_ids=given).logits, model(text, token_type_ids=given).logits)
    # Not by a model that takes none.
    for model in pair("llama"):
        with pytest.raises(ValueError, match="token_type_ids"):
            model.generate(ids(1, 9), token_type_ids=torch.zeros(1, 9, dtype=torch.int64), **GREEDY)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield caplog.records
    logger.removeHandler(caplog.handler)


def test_a_generation_config_is_no_reason_to_warn(warned: list[logging.LogRecord]) -> None:
    chosen = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=127)
    before = chosen.to_dict()
    text = ids(1, 9)
    found = quantized().generate(text, attention_mask=torch.ones_like(text), generation_config=chosen)
    assert found.shape[0] == 1 and chosen.to_dict() == before
    assert not [record for record in warned if "deprecated" in record.getMessage()]
