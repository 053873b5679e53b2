"""EleutherAI's evaluation harness through the cache: every score is what the model says when it reads what is stored.

    python -m kvmix_compile.evaluate.lm_eval run --model kvmix --model_args pretrained=MODEL,budget=2.3 --tasks gsm8k

The harness's own class for transformers' models scores a context in one forward, in which tokens see each other in
full precision: nothing is read from storage, and the scores are the original's, whatever the budget. Here chunks are
exact: in one forward, too, each token reads what lies behind its recent window as it is stored.

Needs lm-eval: pip install 'kvmix-compile[lm-eval]'.
"""

from dataclasses import fields
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvmix_compile.compiler import apply
from kvmix_compile.config import Config

SETTINGS = {field.name for field in fields(Config)}


@register_model("kvmix")
class KVMixLM(HFLM):
    """A causal language model with a compressed cache, as the harness takes it.

    pretrained: a model of transformers or the name or folder of one, which is loaded with `tokenizer`, `dtype`,
        `device`, `revision` and `trust_remote_code`.
    exact_chunks: as of `kvmix_compile.apply`, but that chunks are exact unless it is said that they are not.
    options: those of `kvmix_compile.apply`, budget and the other settings of Config; and HFLM's others, such as
        batch_size, max_length and add_bos_token.

    Raises what transformers and `kvmix_compile.apply` raise.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        exact_chunks: bool = True,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        named = {"revision": revision, "trust_remote_code": trust_remote_code}
        if tokenizer is None and isinstance(pretrained, str):
            tokenizer = pretrained
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, **named)
        model = _loaded(pretrained, device, dtype=dtype, **named) if isinstance(pretrained, str) else pretrained
        told = {name: options.pop(name) for name in SETTINGS & options.keys()}
        compiled = apply(model, tokenizer=tokenizer, exact_chunks=exact_chunks, progress=True, **told)
        super().__init__(compiled, tokenizer=tokenizer, **options)


def _loaded(name: str, device: str | None, **options: Any) -> PreTrainedModel:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **options).eval().to(device)
    return model


if __name__ == "__main__":
    cli_evaluate()
