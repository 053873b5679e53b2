"""The command line on tiny models: what it prints, saves and returns; bad input is a message, not a traceback."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner, Result

import kvmix_compile
from kvmix_command.main import app
from kvmix_compile import compiler
from kvmix_compile.cli import loading
from kvmix_compile.cli.efforts import EVERYTHING
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.one_capture import captured_once

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


def kvmix(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def each_model_is_captured_once() -> Iterator[None]:
    with (
        mock.patch.object(loading, "tiny", cache(tiny)),
        mock.patch.object(compiler, "capture", captured_once),
        mock.patch.object(compiler, "capture_to_measure", lambda model, _: captured_once(model)),
    ):
        yield


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "text.txt").write_text(TEXT)
    path = folder / "plan.json"
    assert kvmix("plan", "tiny:llama", "--calibration", folder / "text.txt", "--output", path).exit_code == 0
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_doctor_shows_every_layer() -> None:
    result = kvmix("doctor", "tiny:gemma2")
    assert result.exit_code == 0
    first, second = (line for line in result.stdout.splitlines() if "model.layers." in line)
    assert "sliding 24" in first
    assert "causal" in second
    assert "verified" in result.stdout


@pytest.mark.parametrize(
    ("name", "reason"), [("tiny:bert", "encoder"), ("tiny:t5", "encoder-decoder"), ("convolution", "conv")]
)
def test_doctor_says_what_is_wrong(name: str, reason: str) -> None:
    result = kvmix("doctor", name)
    assert result.exit_code == 1
    assert reason in result.stderr


def test_plan_is_shown_and_saved(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "plan.json"
    result = kvmix("plan", "tiny:llama", "--storage-budget", 3, "--calibration", text, "--output", path)
    assert result.exit_code == 0
    assert "stored bits" in result.stdout
    assert kvmix_compile.Plan.load(path).storage_bits <= 3


def test_generate_streams_and_sizes_the_cache(plan: Path) -> None:
    result = kvmix("generate", "tiny:llama", "--prompt", TEXT[:300], "--plan", plan, "--max-new-tokens", 8)
    assert result.exit_code == 0
    assert 1 <= len(result.stdout.removesuffix("\n")) <= 8
    assert "cache of 30" in result.stderr
    assert "bits per element" in result.stderr


def test_with_json_on_standard_output_nothing_else_is_there(tmp_path: Path, plan: Path) -> None:
    found = kvmix("doctor", "tiny:llama", "--json", "-")
    assert "MODEL can be compiled" in found.stderr
    report = json.loads(found.stdout)
    assert report["can_be_compiled"] and [site["kv_heads"] for site in report["sites"]] == [2, 2]

    made = kvmix("plan", "tiny:llama", "--json", "-")
    assert "code bits" in made.stderr
    path = tmp_path / "made.json"
    path.write_text(made.stdout)
    assert kvmix_compile.Plan.load(path).as_json() == made.stdout

    arguments = ["--prompt", TEXT[:300], "--plan", plan, "--max-new-tokens", 8]
    written = kvmix("generate", "tiny:llama", *arguments, "--json", "-")
    answer = json.loads(written.stdout)
    assert answer["text"] == kvmix("generate", "tiny:llama", *arguments).stdout.removesuffix("\n")
    assert answer["text"] in written.stderr
    assert answer["prompt_tokens"] == 300 and 1 <= answer["tokens"] <= 8
    assert answer["cache_bytes"] > 0 and answer["bits_per_element"] > 0 and answer["seconds"] > 0


def test_what_is_wrong_with_a_model_is_in_its_json(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert kvmix("doctor", "tiny:bert", "--json", path).exit_code == 1
    found = json.loads(path.read_text())
    assert not found["can_be_compiled"] and "encoder" in found["problem"]


def test_generate_takes_a_folder_and_a_prompt_file(tmp_path: Path, text: Path, plan: Path) -> None:
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    result = kvmix("generate", folder, "--prompt-file", text, "--plan", plan, "--max-new-tokens", 2)
    assert result.exit_code == 1
    assert "512 positions" in result.stderr

    text.write_text(TEXT[:200])
    from_folder = kvmix("generate", folder, "--prompt-file", text, "--plan", plan, "--max-new-tokens", 4)
    by_name = kvmix("generate", "tiny:llama", "--prompt", TEXT[:200], "--plan", plan, "--max-new-tokens", 4)
    assert from_folder.exit_code == 0
    assert from_folder.stdout == by_name.stdout


def test_eval_compares_budgets_and_baselines(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "results.json"
    arguments = ["--text", text, "--tokens", 400, "--budget", 2, "--budget", 16, "--calibration", text, "--json", path]
    result = kvmix("eval", "tiny:llama", *arguments, "--baseline", "kivi")
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    (found,) = record["texts"]
    rows = {row["configuration"]: row for row in found["results"]}
    assert list(rows) == ["original", "fisher, budget 2", "fisher, budget 16", "kivi"]
    assert all(name in result.stdout for name in rows)
    original, lossless = rows["original"], rows["fisher, budget 16"]
    assert original["code_bits"] == lossless["code_bits"] == 16
    assert lossless["perplexity"] == pytest.approx(original["perplexity"], rel=1e-4)
    assert rows["fisher, budget 2"]["code_bits"] <= 2 < rows["fisher, budget 2"]["stored_bits"]
    assert rows["kivi"]["divergence"]["mean"] > 0
    assert record["precisions"]["kivi"] == {"keys": [[2, 32, 16]] * 2, "values": [[2, 32, 16]] * 2}
    assert len(record["importance"]) == 2
    assert found["tokens"] == 400
    assert record["versions"]["torch"]
    assert record["device"].startswith("CPU")


def test_eval_decodes_and_asks_questions_on_made_texts(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "results.json"
    arguments = ["--text", text, "--tokens", 300, "--calibration", text, "--json", path]
    tasks = ["--task", "needle", "--task", "records", "--task-length", 250, "--task-questions", 2, "--decode", 250]
    result = kvmix("eval", "tiny:llama", *arguments, *tasks)
    assert result.exit_code == 0, result.output
    assert "left out: records, 250 tokens: the original answers 0%" in result.stdout
    record = json.loads(path.read_text())
    assert [(text["chunk"], text["window"]) for text in record["texts"]] == [(64, 2048), (1, 250)]
    scores = record["tasks"]
    assert [(score["task"], score["configuration"], len(score["answers"])) for score in scores] == [
        (task, name, 2) for task in ("needle", "records") for name in ("original", "fisher, budget 2.3")
    ]


def test_eval_tries_ways_drafts_and_writing(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "results.json"
    arguments = ["--text", text, "--tokens", 300, "--calibration", text, "--json", path]
    result = kvmix("eval", "tiny:llama", *arguments, "--ways", 300, "--writing", 230, "--drafts", "--exact-chunks")
    assert result.exit_code == 0, result.output
    for title in ("the same answer, however it came?", "drafts: tokens looked up", "free writing: first difference"):
        assert title in result.stdout
    record = json.loads(path.read_text())
    names = ["original", "fisher, budget 2.3", "fisher, budget 2.3, exact chunks"]
    assert list(dict.fromkeys(row["configuration"] for row in record["ways"])) == names[1:]
    assert [row["configuration"] for row in record["drafts"]] == names
    assert [row["configuration"] for row in record["writing"]] == names * 4


def test_eval_has_a_quick_and_a_thorough_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they hold is more than a toy has positions for: it is said before anything is measured."""
    monkeypatch.setattr(compiler, "capture", lambda model: pytest.fail("this takes long, and cannot be used"))
    for flag in ("--quick", "--everything"):
        result = kvmix("eval", "tiny:llama", flag)
        assert result.exit_code == 1
        assert "choose a smaller --passkey-length" in result.stderr


def test_a_text_too_short_to_be_quantized_is_refused_before_any_is_read(text: Path) -> None:
    result = kvmix("eval", "tiny:llama", "--text", text, "--tokens", 300, "--calibration", text, "--decode", 150)
    assert result.exit_code == 1
    assert "windows of 150 tokens are too short" in result.stderr
    assert "perplexity" not in result.stdout


def test_what_is_told_goes_before_what_a_set_holds() -> None:
    chosen = EVERYTHING.with_options(tokens=None, baselines=["kivi"], tasks=[], ways=0, drafts=None)
    assert chosen == replace(EVERYTHING, baselines=("kivi",), ways=0)


def test_eval_asks_for_passkeys_and_plots(tmp_path: Path, text: Path) -> None:
    pytest.importorskip("matplotlib")
    path, plots = tmp_path / "results.json", tmp_path / "plots"
    arguments = ["--text", text, "--tokens", 300, "--calibration", text, "--json", path, "--plots", plots]
    passkeys = ["--passkey-length", 300, "--passkey-length", 350, "--passkey-depth", 0.5]
    policies = ["--policy", "fisher", "--policy", "kvmix", "--storage-budget", 2.6]
    result = kvmix("eval", "tiny:llama", *arguments, *passkeys, *policies)
    assert result.exit_code == 0, result.output
    assert "kvmix, storage budget 2.6 is left out" in result.stderr
    assert "passkeys at the depths 0.5" in result.stdout
    retrievals = json.loads(path.read_text())["passkeys"]
    assert [(row["configuration"], row["tokens"]) for row in retrievals] == [
        (name, length) for length in (300, 350) for name in ("original", "fisher, storage budget 2.6")
    ]
    assert {file.name for file in plots.iterdir()} == {"divergence.png", "frontier.png", "layers.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "tiny:nothing"], "the models zoo has smollm2"),
        (["doctor", "no/such/folder"], "cannot load"),
        (["plan", "tiny:llama", "--budget", "0.5"], "cannot be met"),
        (["plan", "tiny:llama", "--budget", "23"], "16 (nothing quantized) at most, not 23"),
        (["plan", "tiny:llama", "--budget", "nan"], "positive"),
        (["generate", "tiny:llama", "--prompt", "x", "--budget", "23"], "at most, not 23"),
        (["eval", "tiny:llama", "--budget", "23"], "at most, not 23"),
        (["generate", "hand_written", "--prompt", "x"], "without a tokenizer"),
        (["eval", "hand_written"], "without a tokenizer"),
        (["eval", "tiny:llama", "--passkey-depth", "2"], "from 0 (the beginning of the text) to 1"),
        (["eval", "tiny:llama", "--tokens", "64"], "the cache is never read"),
        (["eval", "tiny:llama", "--ways", "600"], "choose a smaller --ways"),
        (["eval", "tiny:llama", "--writing", "600"], "choose a smaller --writing"),
    ],
)
def test_bad_input_is_a_message(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "capture", lambda model: pytest.fail("this takes long, and cannot be used"))
    result = kvmix(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_it_has_a_version() -> None:
    result = kvmix("--version")
    assert result.exit_code == 0 and result.stdout.startswith(f"kvmix_compile {kvmix_compile.__version__}, torch ")


def test_eval_and_generate_take_what_plan_takes(tmp_path: Path, text: Path, plan: Path) -> None:
    path = tmp_path / "results.json"
    result = kvmix(
        "eval", "tiny:llama", "--text", text, "--tokens", 300, "--plan", plan, "--calibration", text, "--json", path
    )
    assert result.exit_code == 0, result.output
    (found,) = json.loads(path.read_text())["texts"]
    assert [row["configuration"] for row in found["results"]] == ["original", "plan.json"]
    arguments = ["--prompt", TEXT[:100], "--max-new-tokens", 2]
    assert kvmix("generate", "tiny:llama", *arguments, "--storage-budget", 3).exit_code == 0


def test_a_name_that_is_nearly_right_is_recognised() -> None:
    result = kvmix("doctor", "smolm2")
    assert result.exit_code == 1 and "Did you mean smollm2?" in result.stderr
