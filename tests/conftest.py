"""What every test runs under: no network, a fixed seed, and hypothesis in its reproducible mode."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before transformers and torch are imported anywhere: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
# What one test compiled, another is not to find; tests of keeping set it.
os.environ["KVMIX_KEEP"] = "0"
# Where several processes run tests, each has its share of the cores.
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))

import pytest
from hypothesis import settings

# Torch and transformers are imported where they are first needed: a process that only hands out tests needs neither.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

settings.register_profile("kvmix", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("kvmix")


# The files that take longest, ten seconds and more. They come first: begun last, one of them would keep one process
# busy and the others idle.
LONGEST = (
    "distributed/test_tensor_parallel.py",
    "devices/test_device_map.py",
    "kernels/gpu/test_triton_interpreter.py",
    "backend/test_backend.py",
    "kernels/gpu/test_triton_compile.py",
    "benchmarks/test_models_benchmark.py",
    "test_end_to_end.py",
    "kernels/gpu/test_compiled.py",
    "runtime/test_inductor.py",
    "runtime/test_whole_generations.py",
    "passes/match/test_static_cache.py",
    "passes/untouched/test_untouched.py",
    "passes/untouched/test_zoo_untouched.py",
    "runtime/test_drafts.py",
    "backend/test_graphs.py",
    "test_errors.py",
    "cli/test_cli.py",
    "backend/test_caches.py",
    "kernels/cpu/test_cpu_attend.py",
    "passes/match/test_sites.py",
    "passes/match/test_special_attention.py",
    "repository/test_docs.py",
    "runtime/test_ambient.py",
    "runtime/test_model.py",
    "benchmarks/test_peak_memory.py",
    "passes/measure/test_exponents.py",
    "kernels/test_attend.py",
    "evaluate/test_evaluation.py",
    "fit/test_caches.py",
    "fit/test_devices.py",
    "cli/test_fit.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Tracing makes millions of small objects: the collector is to look at these seldom, and at the libraries never."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(500_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def toys_are_captured_quickly() -> None:
    """PyTorch keeps the results of fake operations for models of many layers: those of two take a quarter longer."""
    import torch._dynamo.config

    torch._dynamo.config.fake_tensor_cache_enabled = False


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def dynamo_begins_anew() -> Iterator[None]:
    """Nothing that other tests compiled; no gradients."""
    import torch

    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def smollm2() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct in float32, shared: tests leave it as they found it."""
    from kvmix_compile.models_zoo.smollm2 import load_smollm2

    return load_smollm2()
