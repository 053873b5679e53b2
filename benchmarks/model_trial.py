"""What is tried on one architecture: `apply`, generation with and without quantization, and the backend."""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers import logging as transformers_logging

import kvmix_compile
from benchmarks.errors import one_line, without_folders
from benchmarks.toy_models import VOCABULARY, NoToyError, toy_model
from kvmix_compile.backend import packed_cache
from kvmix_compile.compiler import apply_plans
from kvmix_compile.errors import KVMixError
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.capture.signature import cache_in, parameters_of

# A state so small that most of the prompt is read from storage.
SINKS, RECENT = 4, 32
ROWS, PROMPT, PADDING, NEW_TOKENS = 2, 150, 5, 16
CALIBRATION = 96
LOSSLESS, BUDGET = 16.0, 2.3
FIRST_ORDINARY_ID = 3  # below it are padding, beginning and end


@dataclass
class Trial:
    """What became of one architecture; None: not come to.

    not_run: why there was nothing to try, a model that cannot be made small or does not generate text by itself.
    sites, masks: the attentions that were matched, and what they do (mask, soft cap, ALiBi, sink logits), each once.
    verified: the largest difference of logits that rewriting made, in their standard deviations.
    padded: whether what follows was tried on a batch one row of which is padded on the left.
    text: whether greedy text with a plan of 16 bits is the original's. quantized: whether it has the right length, and
        finite logits, at 2.3 bits.
    token_bytes: what a packed token takes at 2.3 bits; own_cache_bytes: in the model's own cache, where it keeps one.
    refusal: why `apply` declined. backend: as `text`, of torch.compile(backend="kvmix") with a StaticCache;
        backend_refusal: why it declined.
    static_cache: why the original itself does not generate with torch.compile and a StaticCache.
    failures: errors that are no refusals.
    """

    model_type: str
    model_class: str | None = None
    not_run: str | None = None
    sites: int | None = None
    masks: tuple[str, ...] = ()
    verified: float | None = None
    padded: bool | None = None
    text: bool | None = None
    quantized: bool | None = None
    token_bytes: float | None = None
    own_cache_bytes: float | None = None
    refusal: str | None = None
    backend: bool | None = None
    backend_refusal: str | None = None
    static_cache: str | None = None
    failures: tuple[str, ...] = ()


def try_architecture(model_type: str) -> Iterator[dict[str, Any]]:
    """Everything there is to try, in this process: the Trial as JSON, first without the backend, then whole."""
    transformers_logging.set_verbosity_error()
    trial = Trial(model_type)
    try:
        model = toy_model(model_type)
        trial.model_class = type(model).__name__
        prompt = prompt_for(model)
        expected = generate(model, prompt).sequences
        if not torch.equal(generate(model, prompt, use_cache=False).sequences, expected):
            raise NoToyError("its text without its cache is another one than with it")
    except NoToyError as error:
        trial.not_run = f"cannot be tried: {error}"
    except Exception as error:
        trial.not_run = f"does not generate from token ids: {one_line(error)}"
    else:
        trial.padded = "attention_mask" in prompt
        plans = _try_apply(trial, model, prompt, expected)
        yield asdict(trial)
        gc.collect()
        _try_backend(trial, model, plans, prompt, expected)
    yield asdict(trial)


def try_static_cache(model_type: str) -> None:
    """What the original itself does, compiled with a StaticCache."""
    transformers_logging.set_verbosity_error()
    model = toy_model(model_type)
    _generate_compiled(model, prompt_for(model), backend="eager")


def prompt_for(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows of ordinary ids; one begins with padding where the model takes positions."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ORDINARY_ID, VOCABULARY, (ROWS, PROMPT), generator=generator)
    if "position_ids" not in parameters_of(model.forward):
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, prompt: dict[str, Tensor], **options: Any) -> Any:
    """Greedy text and its logits, as transformers' GenerateOutput."""
    return model.generate(
        **prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # type: ignore[operator]  # fmt: skip


def _try_apply(trial: Trial, model: PreTrainedModel, prompt: dict[str, Tensor], expected: Tensor) -> list[Plan]:
    """Returns the plans without and with quantization, if the model could be measured."""
    plans: list[Plan] = []
    try:
        importance = kvmix_compile.analyze(model, calibration=_calibration(), sinks=SINKS, recent=RECENT)
        plans += (importance.allocate(budget=budget) for budget in (LOSSLESS, BUDGET))
        lossless, quantized = apply_plans(model, plans)
        report = lossless.kvmix_report
        trial.sites, trial.verified = len(report.sites), report.verified
        trial.masks = tuple(dict.fromkeys(site.attention for site in report.sites))
        trial.text = torch.equal(generate(lossless, prompt).sequences, expected)
        report = quantized.kvmix_report
        trial.token_bytes, trial.own_cache_bytes = report.token_bytes, report.own_cache_bytes
        output = generate(quantized, prompt)
        is_finite = all(bool(logits.isfinite().all()) for logits in output.logits)
        trial.quantized = is_finite and output.sequences.shape == expected.shape
    except KVMixError as error:
        trial.refusal = without_folders(str(error))
    except Exception as error:
        trial.failures += (f"apply: {one_line(error)}",)
    return plans


def _calibration() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_ORDINARY_ID, VOCABULARY, (1, CALIBRATION), generator=generator)


def _try_backend(
    trial: Trial, model: PreTrainedModel, plans: list[Plan], prompt: dict[str, Tensor], expected: Tensor
) -> None:
    chosen = {"plan": plans[0]} if plans else {"budget": LOSSLESS, "calibration": _calibration()}
    try:
        output = _generate_compiled(model, prompt, backend="kvmix", options={"backend": "eager", **chosen})
        past = cache_in(output)
        if not isinstance(past, StaticCache) or packed_cache(past) is None:
            trial.backend_refusal = "no attention over a StaticCache was found, and the model was left as it is"
        else:
            trial.backend = torch.equal(output.sequences, expected)
    except KVMixError as error:
        trial.backend_refusal = without_folders(str(error))
    except Exception as error:
        try:
            _generate_compiled(model, prompt, backend="eager")
        except Exception as its_own:
            trial.static_cache = one_line(its_own)
        else:
            trial.failures += (f"backend: {one_line(error)}",)


def _generate_compiled(model: PreTrainedModel, prompt: dict[str, Tensor], **options: Any) -> Any:
    torch._dynamo.reset()
    model.compile(**options)
    return generate(model, prompt, cache_implementation="static")
