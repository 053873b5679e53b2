"""kvmix_compile: a compiler pass that shrinks the KV cache of unmodified causal language models.

model = kvmix_compile.apply(model, budget=2.3)
"""

from kvmix_compile.compiler import analyze, apply, diagnose
from kvmix_compile.errors import KVMixError
from kvmix_compile.evaluate.perplexity import perplexity
from kvmix_compile.passes.allocate.plan import Plan
from kvmix_compile.passes.measure.importance import Importance
from kvmix_compile.pretrained import KVMixConfig
from kvmix_compile.runtime.cache import KVMixCache

__version__ = "0.1.0"
__all__ = [
    "Importance",
    "KVMixCache",
    "KVMixConfig",
    "KVMixError",
    "Plan",
    "analyze",
    "apply",
    "diagnose",
    "perplexity",
]
