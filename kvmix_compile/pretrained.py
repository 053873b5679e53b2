"""from_pretrained: transformers loads a model and gives it a compressed cache, in one call.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=KVMixConfig(budget=2.3))

What compresses a model as it is loaded is a quantizer to transformers. This one leaves the weights as they are. A
folder to which a compiled model was saved says itself how, so that nothing need be passed.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kvmix_compile.compiler import apply_in_place
from kvmix_compile.config import Config
from kvmix_compile.errors import PlanError
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.runtime.model import CompiledModel
from kvmix_compile.runtime.saving import METHOD, record


@register_quantization_config(METHOD)
class KVMixConfig(QuantizationConfigMixin):
    """How the cache of a model that `from_pretrained` loads is to be compressed.

    plan: a Plan made earlier, its path, or its record in config.json.
    compile, verify: as `kvmix_compile.apply` has them.
    options: what else `apply` can be told instead of a plan: budget, storage_budget, policy, tokenizer, calibration,
        recent_window, sinks, recent, exact_chunks, context.

    Raises KVMixError as `apply` does, before anything is loaded.
    """

    def __init__(
        self,
        plan: Any = None,
        *,
        compile: bool = False,
        verify: bool = True,
        quant_method: str = METHOD,
        **options: Any,
    ) -> None:
        known = Config.__dataclass_fields__.keys() - {"plan"}
        if unknown := sorted(options.keys() - known):
            raise PlanError(f"KVMixConfig has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
        if isinstance(plan, Mapping):
            plan = Plan.from_json(json.dumps(plan))
        self.quant_method = quant_method  # type: ignore[assignment]  # no member of transformers' enumeration
        self.asked = Config(plan=plan, **options).checked()
        self.compile, self.verify = compile, verify

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps: the plan, or what is asked for where there is none yet."""
        if self.asked.given_plan is not None:
            return record(self.asked.given_plan, self.compile)
        plain = {name: value for name, value in vars(self.asked).items() if isinstance(value, int | float | str)}
        return {"quant_method": METHOD, "compile": self.compile, **plain}


@register_quantizer(METHOD)
class KVMixQuantizer(HfQuantizer):
    """Compresses the cache of a model once its weights are there."""

    quantization_config: KVMixConfig

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        apply_in_place(model, config.asked, compile=config.compile, verify=config.verify)
        config.asked = Config(plan=cast(CompiledModel, model).kvmix_plan).checked()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
