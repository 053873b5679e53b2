"""Calibration: the token ids on which a model's keys and values are measured.

Whatever comes in (texts, ids, or nothing) becomes rows of one document's or several joined documents' tokens, without
padding. With a tokenizer and no data, English that ships with CPython is used; with neither, the model writes its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmix_compile.english import built_in_english
from kvmix_compile.passes.capture.export import logits_of
from kvmix_compile.passes.capture.signature import cache_in, cache_name
from kvmix_compile.passes.errors import CalibrationError

CalibrationData = str | Sequence[str] | Tensor | Sequence[Sequence[int] | Tensor]

SHORTEST_ROW = 32  # tokens; a remainder shorter than one block of the cache measures nothing
SAMPLED_ROWS, SAMPLED_LENGTH = 4, 128  # short, because without a cache every token costs a forward of its row
SEED = 0

ADVICE = "pass calibration=[...] with texts (and tokenizer=...) or token ids, a few hundred tokens at least"

# With fewer, what decides where single bits do is noise (docs/method.md).
DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class Calibration:
    """Token ids to measure on: int64 [rows, tokens] each, unpadded, on the model's device; `source` is one phrase."""

    batches: tuple[Tensor, ...]
    source: str

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Every row, int64 [tokens]."""
        return tuple(row for batch in self.batches for row in batch)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(batch.shape[1] for batch in self.batches)

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)


def build_calibration(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: CalibrationData | None = None,
    tokens: int = DEFAULT_TOKENS,
    length: int = 512,
) -> Calibration:
    """Rows of at most `length` token ids, about `tokens` in all (fewer where the data ends sooner).

    `calibration` is texts (these need `tokenizer`), token ids [tokens] or [rows, tokens], or a list of token id
    sequences. Texts and short sequences are joined, with the end-of-sequence token between them where it is known.
    Rows never exceed the model's configured positions. The global random state is left alone.

    Raises CalibrationError for data that is empty, of another kind, or not of the model's vocabulary.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    vocabulary, length = _vocabulary(model, device), _row_length(model, length)
    if tokens < 2 or length < 2:
        raise CalibrationError(f"calibration needs rows of 2 tokens or more, got tokens={tokens}, length={length}")

    prefix: list[int] = []
    if calibration is not None and not _is_texts(calibration):
        origin, streams = "the token ids given", _id_streams(calibration, _end_token(model, tokenizer))
    elif calibration is not None:
        origin, (prefix, streams) = "the texts given", _text_streams(model, tokenizer, calibration, tokens)
    elif tokenizer is not None:
        origin = "built-in English (pydoc_data.topics)"
        prefix, streams = _text_streams(model, tokenizer, _english(), tokens)
    else:
        origin = "sampled from the model itself, as no tokenizer was given"
        streams = list(_sample(model, vocabulary, device, min(length, SAMPLED_LENGTH)))

    rows = _cut(streams, prefix, tokens, length)
    if not rows:
        raise CalibrationError(f"the calibration data holds fewer than 2 tokens: {ADVICE}")
    _check_ids(rows, vocabulary)
    batches = tuple(torch.stack(tuple(group)).to(device) for _, group in groupby(rows, key=len))
    return Calibration(batches, _describe(origin, rows))


def _describe(origin: str, rows: Sequence[Tensor]) -> str:
    longest, shortest = max(map(len, rows)), min(map(len, rows))
    size = f"{longest}" if longest == shortest else f"{shortest} to {longest}"
    return f"{origin}: {sum(map(len, rows))} tokens in {len(rows)} row{'s' * (len(rows) > 1)} of {size}"


def _cut(streams: Sequence[Tensor], prefix: Sequence[int], tokens: int, length: int) -> list[Tensor]:
    """Rows of at most `length`, each beginning with `prefix`, from the first `tokens` tokens of the streams."""
    first = torch.tensor(prefix, dtype=torch.int64)
    rows: list[Tensor] = []
    for stream in streams:
        kept = stream[:tokens]
        tokens -= len(kept)
        rows += [torch.cat((first, piece)) for piece in kept.split(length - len(first)) if len(piece)]
    # Data that is short altogether is better than none; what is left over from more data is not worth a row.
    usable = [row for row in rows if len(row) >= SHORTEST_ROW] or rows[:1]
    return [row for row in usable if len(row) >= 2]


def _check_ids(rows: Sequence[Tensor], vocabulary: int) -> None:
    lowest, highest = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise CalibrationError(
            f"token id {wrong} is outside the model's vocabulary of {vocabulary}: "
            "pass ids made by this model's own tokenizer, without padding or ignore labels"
        )


# What the model says about itself


def _setting(model: nn.Module, name: str) -> object:
    """A setting of a transformers model's text config, None for any other model."""
    return getattr(model.config.get_text_config(), name, None) if isinstance(model, PreTrainedModel) else None


def _vocabulary(model: nn.Module, device: torch.device) -> int:
    configured = _setting(model, "vocab_size")
    if isinstance(configured, int):
        return configured
    with _evaluating(model):
        return logits_of(model(torch.zeros(1, 2, dtype=torch.int64, device=device))).shape[-1]


def _row_length(model: nn.Module, wanted: int) -> int:
    configured = _setting(model, "max_position_embeddings")
    return min(wanted, configured) if isinstance(configured, int) else wanted


def _end_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The end-of-sequence token, as a list of one id or of none."""
    token = tokenizer.eos_token_id if tokenizer is not None else _setting(model, "eos_token_id")
    if isinstance(token, list):
        token = token[0] if token else None
    return [token] if isinstance(token, int) else []


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and without dropout, which would also draw from the global random state."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


# Texts


def _is_texts(calibration: CalibrationData) -> bool:
    if isinstance(calibration, str):
        return True
    return isinstance(calibration, Sequence) and any(isinstance(item, str) for item in calibration)


def _text_streams(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, texts: CalibrationData, tokens: int
) -> tuple[list[int], list[Tensor]]:
    """What the tokenizer starts a text with, and the texts joined into one stream, of `tokens` or somewhat more."""
    if tokenizer is None:
        raise CalibrationError(
            "texts were given without a tokenizer: pass tokenizer=..., or token ids instead of texts"
        )
    texts = [texts] if isinstance(texts, str) else texts
    end = _end_token(model, tokenizer)
    joined: list[int] = []
    for text in texts:
        if len(joined) >= tokens:
            break
        if not isinstance(text, str):
            raise CalibrationError(f"calibration mixes texts with {type(text).__name__}: {ADVICE}")
        # Not verbose: a text longer than the model's positions is cut into rows, so a warning would mislead.
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        joined += [*(end if joined and ids else []), *ids]
    prefix = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]
    return prefix, [torch.tensor(joined, dtype=torch.int64)]


def _english() -> list[str]:
    try:
        return built_in_english()
    except ImportError as error:
        raise CalibrationError(
            f"this Python comes without pydoc_data, the built-in calibration text: {ADVICE}"
        ) from error


# Token ids


def _id_streams(calibration: CalibrationData, end: list[int]) -> list[Tensor]:
    """Rows long enough stand for themselves; shorter ones are joined."""
    documents = _documents(calibration)
    if documents and all(len(document) >= SHORTEST_ROW for document in documents):
        return documents
    separator = torch.tensor(end, dtype=torch.int64)
    pieces = [piece for document in documents if len(document) for piece in (separator, document)]
    return [torch.cat(pieces[1:])] if pieces else []


def _documents(calibration: CalibrationData) -> list[Tensor]:
    if isinstance(calibration, Tensor):
        if calibration.dim() not in (1, 2):
            raise CalibrationError(f"token ids must be [tokens] or [rows, tokens], got {list(calibration.shape)}")
        return [_ids(row) for row in torch.atleast_2d(calibration)]
    if not isinstance(calibration, Sequence):
        raise CalibrationError(f"cannot calibrate on a {type(calibration).__name__}: {ADVICE}")
    if calibration and all(isinstance(item, int) for item in calibration):
        return [_ids(calibration)]
    return [_ids(document) for document in calibration]


def _ids(document: object) -> Tensor:
    """One document's token ids as int64 [tokens], on the CPU."""
    try:
        ids = torch.as_tensor(document).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"cannot read token ids from a {type(document).__name__}: {ADVICE}") from error
    if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise CalibrationError(f"token ids must be integers [tokens], got {ids.dtype} {list(ids.shape)}: {ADVICE}")
    return ids.to(torch.int64)


# The model's own words


def _sample(model: nn.Module, vocabulary: int, device: torch.device, length: int) -> Tensor:
    """Rows int64 [SAMPLED_ROWS, length] that the model writes at temperature 1, from its first token or random ones."""
    generator = torch.Generator().manual_seed(SEED)
    start = _setting(model, "bos_token_id")
    ids = torch.randint(vocabulary, (SAMPLED_ROWS, 1), generator=generator)
    if isinstance(start, int) and start < vocabulary:
        ids.fill_(start)
    options = {"use_cache": True} if isinstance(model, PreTrainedModel) else {}
    cache = None
    with _evaluating(model):
        while ids.shape[1] < length:
            if cache is None:
                output = model(ids.to(device), **options)
            else:
                output = model(ids[:, -1:].to(device), **{cache_name(model.forward): cache}, **options)
            cache = cache_in(output)
            probabilities = logits_of(output)[:, -1].float().softmax(-1).cpu()
            if not probabilities.isfinite().all():
                raise CalibrationError(f"the model's logits are not finite, so it cannot write its own text: {ADVICE}")
            ids = torch.cat((ids, torch.multinomial(probabilities, 1, generator=generator)), dim=1)
    return ids
