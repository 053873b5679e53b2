"""The console script: it answers about itself, and refuses what cannot be meant, without importing PyTorch."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner, Result

from kvmix_command import main
from kvmix_command.known import MODELS
from kvmix_command.main import app
from kvmix_command.options import memory_bytes, models_and_folders
from tests.helpers.repository import ROOT

HEAVY = ("torch", "transformers", "kvmix_compile", "numpy")
PROGRAM = """
    import sys
    from kvmix_command.main import app
    try:
        app(prog_name="kvmix")
    finally:
        heavy = [name for name in {heavy} if name in sys.modules]
        print("imported:", heavy, file=sys.stderr)
"""


def run_alone(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own, which says on standard error what it imported."""
    command = [sys.executable, "-c", dedent(PROGRAM).format(heavy=HEAVY), *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "doctor"),
        (["plan", "--help"], 0, "--storage-budget"),
        (["eval", "--help"], 0, "--passkey-depth"),
        (["--version"], 0, "torch "),
        (["plan", "smollm2", "--policy", "best"], 2, "there is no policy best"),
    ],
)
def test_it_answers_without_importing_what_takes_long(arguments: list[str], code: int, said: str) -> None:
    done = run_alone(*arguments)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "imported: []" in done.stderr


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "import_module", lambda module: pytest.fail("this was to be refused before"))


def kvmix(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--budget", "3", "--storage-budget", "3"], "--budget and --storage-budget exclude each other"),
        (["plan", "--output", "no/such/folder/plan.json"], "a folder that exists"),
        (["plan", "--output", "."], "is a directory"),
        (["plan", "--policy", "best"], "there is no policy best; choose from fisher, kvmix, uniform"),
        (["plan", "--calibration", "missing.txt"], "'missing.txt' does not exist"),
        (["plan", "--context", "0"], "Invalid value for '--context'"),
        (["plan", "--for", "vlm"], "there is no engine vlm; did you mean vllm?"),
        (["plan", "--for", "onnx"], "there is no engine onnx; choose from vllm, modelopt"),
        (["plan", "--for", "vllm", "--format", "fp9"], "there is no format fp9; did you mean fp8?"),
        (["plan", "--format", "fp8"], "--format is about a serving engine: say with --for which one"),
        (["plan", "--most-loss", "0"], "--most-loss is about a serving engine"),
        (["plan", "--for", "vllm", "--policy", "kvmix"], "--policy is about this project's own cache"),
        (["plan", "--for", "vllm", "--budget", "9", "--most-loss", "1"], "exclude each other"),
        (["plan", "--for", "vllm", "--exported", __file__, "--format", "fp8"], "--exported has chosen already"),
        (["doctor", "--json", "no/such/folder/found.json"], "a folder that exists"),
        (["fit", "--memory", "80"], "80 is no number of bytes: write 80GB"),
        (["fit", "--memory", "0GB"], "0GB is no number of bytes"),
        (["fit", "--batch", "0"], "Invalid value for '--batch'"),
        (["fit", "--dtype", "int4"], "there is no dtype int4; choose from bfloat16, float16, float32"),
        (["generate"], "give a prompt"),
        (["generate", "--prompt", "x", "--prompt-file", __file__], "give a prompt: either"),
        (["generate", "--prompt", " "], "the prompt is empty"),
        (["generate", "--prompt-file", "missing.txt"], "'missing.txt' does not exist"),
        (["generate", "--prompt", "x", "--plan", "missing.json"], "'missing.json' does not exist"),
        (["generate", "--prompt", "x", "--plan", __file__, "--budget", "2"], "--plan and --budget exclude each other"),
        (
            ["serve", "--plan", __file__, "--budget", "2", "--storage-budget", "2"],
            "--storage-budget exclude each other",
        ),
        (["eval", "--policy", "fisher", "--policy", "best"], "there is no policy best"),
        (["eval", "--baseline", "atom"], "there is no baseline atom; choose from kivi"),
        (["eval", "--task", "riddle"], "there is no task riddle"),
        (["eval", "--text", "missing.txt"], "'missing.txt' does not exist"),
        (["eval", "--json", "no/such/folder/results.json"], "a folder that exists"),
        (["eval", "--quick", "--everything"], "exclude each other"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], message: str) -> None:
    command, *options = arguments
    result = kvmix(command, "tiny:llama", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("written", "count"),
    [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("1.5 tb", 15 * 10**11), ("512kB", 512_000), ("7B", 7)],
)
def test_memory_is_read_as_it_is_written(written: str, count: int) -> None:
    assert memory_bytes(written) == count


def test_models_are_completed(tmp_path: Path) -> None:
    assert list(models_and_folders("")) == list(MODELS)
    assert list(models_and_folders("tiny:gemma")) == ["tiny:gemma2", "tiny:gemma3"]
    (tmp_path / "models").mkdir()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.txt").touch()
    assert list(models_and_folders(f"{tmp_path}/mod")) == [f"{tmp_path}/model.gguf", f"{tmp_path}/models/"]


def completed(line: str) -> list[str]:
    """What a shell is told to offer at the end of a line."""
    environment = {"_KVMIX_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = run_alone(**environment)
    assert "imported: []" in done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("kvmix do", ["doctor"]),
        ("kvmix doctor smol", ["smollm2"]),
        ("kvmix plan smollm2 --policy ", ["fisher", "kvmix", "uniform"]),
        ("kvmix eval smollm2 --baseline turbo", ["turboquant-4", "turboquant-3"]),
    ],
)
def test_a_shell_completes_names(line: str, offered: list[str]) -> None:
    assert completed(line) == offered
