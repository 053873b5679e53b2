"""Engines: which layers of a serving engine keep one of its own formats, chosen by what they are measured to lose."""

from kvmix_compile.engines.measured import MeasuredFormats, analyze
from kvmix_compile.engines.model_optimizer import metadata, read_metadata
from kvmix_compile.engines.plan import EngineLayer, EnginePlan
from kvmix_compile.engines.vllm import vllm_options

__all__ = [
    "EngineLayer",
    "EnginePlan",
    "MeasuredFormats",
    "analyze",
    "metadata",
    "read_metadata",
    "vllm_options",
]
