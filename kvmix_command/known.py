"""What the command line says of kvmix_compile without importing it.

tests/command/test_known.py holds each of these to what it is said of.
"""

# As `kvmix --version` lists them.
PACKAGES = ("kvmix-compile", "torch", "transformers")

# kvmix_compile.cli.loading.NAMES.
MODELS = (
    "smollm2", "tiny:llama", "tiny:mistral", "tiny:qwen2", "tiny:qwen3", "tiny:gemma2", "tiny:gemma3", "tiny:phi3",
    "tiny:gpt2", "tiny:opt", "tiny:gpt_neox", "tiny:falcon", "tiny:mixtral", "tiny:llama4", "tiny:gpt_oss",
    "tiny:bloom", "tiny:mpt", "tiny:falcon_alibi", "tiny:deepseek_v3", "tiny:lfm2", "tiny:qwen3_next", "tiny:bamba",
    "tiny:bert", "tiny:t5", "tiny:mamba", "hand_written", "fused_arange", "convolution",
)  # fmt: skip

# kvmix_compile.cli.fit.DTYPES.
DTYPES = ("bfloat16", "float16", "float32")

# kvmix_compile.config.
DEFAULT_BUDGET = 2.3
POLICIES = ("fisher", "kvmix", "uniform")
DEFAULT_POLICY = "fisher"

# kvmix_compile.cli.engines.ENGINES, passes.allocate.whole_layers.FORMATS, and engines.measured.
ENGINES = ("vllm", "modelopt")
CACHE_FORMATS = ("fp8", "nvfp4", "fp8_k_nvfp4_v")
MOST_LOSS = 0.01

# kvmix_compile.evaluate: baselines, puzzles, and how much is measured where it is not told.
BASELINES = (
    "kivi", "kvmix-paper", "q4_0-hadamard", "kvarn-k4v2", "turboquant-4", "turboquant-3", "oscar-2", "quanto-4",
    "quanto-2", "hqq-2",
)  # fmt: skip
TASKS = (
    "needle", "needle-among-needles", "values", "queries", "variables", "common-words", "records", "passage", "json",
)  # fmt: skip
TOKENS = 4096
PASSKEY_LENGTH = 2048
TASK_LENGTH = 1000
TASK_QUESTIONS = 10
