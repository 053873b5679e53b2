"""What every test runs under: no network, a fixed seed, and hypothesis in its reproducible mode."""

import os

# Before transformers is imported anywhere: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmix_compile.models_zoo.smollm2 import load_smollm2

settings.register_profile("kvmix", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("kvmix")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, shared: tests leave it as they found it."""
    return load_smollm2()
