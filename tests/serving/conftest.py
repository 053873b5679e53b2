"""What vLLM reads when it is imported: engines run in the tests' own process, and take what cores there are."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
