"""`kvmix report`: the text, and the page: what it says, that it is whole HTML, and that it needs no network."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner, Result

from kvmix_command.main import app
from kvmix_compile import Plan, compiler
from kvmix_compile.cli import report
from kvmix_compile.cli.loading import LoadedModel
from kvmix_compile.cli.page import page
from kvmix_compile.compiler import Examined, examine
from kvmix_compile.config import Config
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.passes.match.sites import Refusal
from kvmix_compile.report import Report
from tests.helpers.one_capture import captured_once, zoo

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
# Elements that have no end tag.
VOID = {"meta", "link", "br", "img", "col", "input", "hr"}
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Its text, the names and numbers in titles too; that every element ends where it should; what it links to."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(source)
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        self.words += [value or "" for name, value in attributes if name == "title"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """<path/> and the like: nothing is left open."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> in {self.open} at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module", autouse=True)
def each_model_is_captured_once() -> Iterator[None]:
    with mock.patch.object(compiler, "capture", captured_once):
        yield


def examined(name: str, **asked: object) -> tuple[Report, Examined | None]:
    options: dict[str, object] = {"tokenizer": character_tokenizer(), "calibration": TEXT, "sinks": 4, "recent": 32}
    return examine(zoo(name), Config(**(options | asked)).checked())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llama() -> tuple[Report, Examined]:
    found, of_model = examined("llama")
    assert of_model is not None
    return found, of_model


def kvmix(*arguments: object) -> Result:
    with mock.patch.object(report, "load_model", lambda name: LoadedModel(zoo("llama"), character_tokenizer())):
        return CliRunner().invoke(app, ["report", "tiny:llama", *map(str, arguments)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def evaluation(path: Path, layers: list[str], perplexity: float = 9000.0) -> Path:
    divergence = dict.fromkeys(("mean", "median", "worst_percent", "worst_permille", "largest"), 0.25)
    rows = [
        {"configuration": name, "code_bits": bits, "stored_bits": bits, "held_bits": bits, "perplexity": number,
         "divergence": divergence | {"by_position": [0.25]}, "agreement": 0.5, "probability_change": 0.1}
        for name, bits, number in (
            ("original", 16, 20.5), ("fisher, budget 2", 2.5, 20.75), ("fisher, budget 3", 3.5, 20.625),
            ("kivi", 3, perplexity),
        )
    ]  # fmt: skip
    texts = [{"text": "wiki.txt", "tokens": 4096, "window": 2048, "chunk": 64, "results": rows}]
    importance = [{"layer": layer} for layer in layers]
    path.write_text(json.dumps({"model": "toy", "texts": texts, "importance": importance}))
    return path


def layers_of(of_model: Examined) -> list[str]:
    return [site.layer for site in of_model.plan.sites]


def test_the_page_is_whole_and_says_what_is_known(llama: tuple[Report, Examined]) -> None:
    found, of_model = llama
    made = Page(page("tiny:llama", found, of_model))
    plan = of_model.plan
    assert all(made.text.count(layer) >= 8 for layer in layers_of(of_model))
    for expected in (
        "tiny:llama", "LlamaForCausalLM", f"{plan.storage_bits:.2f}", f"{plan.code_bits:.2f} of codes",
        f"keys {plan.key_bits:.2f}", f"{found.token_bytes:,.0f}", f"{found.own_cache_bytes:,.0f}", "this plan",
        "first 4 and the last 32 tokens", str(found.calibration), "not measured", "2 × causal: 4 query heads",
    ):  # fmt: skip
        assert expected in made.text, expected
    for site in plan.sites:
        assert f"{site.layer}, keys: " in made.text
        assert f"{site.key.mean_bits:g} bits: " in made.text


def test_it_asks_nobody_for_anything(llama: tuple[Report, Examined]) -> None:
    source = page("tiny:llama", *llama)
    assert Page(source).links == []
    assert not re.search(r"https?:|url\(|@import|<script", source)


def test_what_comes_from_models_is_no_markup(llama: tuple[Report, Examined]) -> None:
    found, of_model = llama
    evil = "<img src=http://x onerror=alert(1)>\"'&"
    sites = tuple(replace(site, layer=evil, attention=evil) for site in found.sites)
    planned = tuple(replace(site, layer=evil) for site in of_model.plan.sites)
    found = replace(
        found, model=evil, sites=sites, notes=(evil,), problem=evil, refused=(Refusal(evil, evil),), calibration=evil,
        seconds={evil: 1.0},
    )  # fmt: skip
    source = page(evil, found, replace(of_model, plan=replace(of_model.plan, sites=planned)))
    made = Page(source)
    assert "<img" not in source and made.links == []
    assert made.text.count(evil) > 20


def test_it_shows_what_was_measured(llama: tuple[Report, Examined], tmp_path: Path) -> None:
    found, of_model = llama
    for worst in (9000.0, float("inf"), float("nan")):
        path = evaluation(tmp_path / "results.json", layers_of(of_model), worst)
        made = Page(page("tiny:llama", found, of_model, report.read_evaluation(path)))
        assert "the model itself, 20.50" in made.text
        assert "fisher, budget 2: 2.50 bits stored, perplexity 20.75" in made.text
        assert f"Above the edge: kivi: 3.00 bits stored, perplexity {worst:.4g}." in made.text
        assert "4096 tokens (wiki.txt) in windows of 2048" in made.text
        assert "not measured" not in made.text


def test_windows_and_other_policies_have_pages_too() -> None:
    for name, policy in (("gemma2", "fisher"), ("llama", "uniform")):
        found, of_model = examined(name, policy=policy)
        made = Page(page(name, found, of_model))
        assert ("predicted rise of perplexity" in made.text) == (policy == "fisher")
        assert "this plan" in made.text and f"Policy {policy}." in made.text


def test_where_nothing_is_read_from_storage_nothing_is_predicted(llama: tuple[Report, Examined]) -> None:
    found, of_model = llama
    sites = tuple(
        replace(
            site,
            key_sensitivity=dict.fromkeys(site.key_sensitivity, 0.0),
            value_sensitivity=dict.fromkeys(site.value_sensitivity, 0.0),
        )
        for site in of_model.importance.sites
    )
    unread = replace(of_model, importance=replace(of_model.importance, sites=sites))
    assert "Nothing is predicted" in Page(page("tiny:llama", found, unread)).text


def test_the_command_writes_a_page_and_prints_a_text(tmp_path: Path, text: Path) -> None:
    html = tmp_path / "out.html"
    done = kvmix("--calibration", text, "--budget", 3, "--html", html)
    assert done.exit_code == 0, done.output
    assert "3.00 of codes" in Page(html.read_text()).text
    done = kvmix("--calibration", text, "--budget", 3)
    assert done.exit_code == 0
    assert "2 attention sites matched" in done.stdout and "bytes a token" in done.stdout


def test_a_plan_that_is_given_is_measured_with_its_own_recent_tokens(
    llama: tuple[Report, Examined], tmp_path: Path
) -> None:
    llama[1].plan.save(tmp_path / "plan.json")
    _, of_model = examined("llama", plan=tmp_path / "plan.json", sinks=None, recent=None)
    assert of_model is not None
    assert of_model.plan == llama[1].plan == Plan.load(tmp_path / "plan.json")
    assert of_model.importance == llama[1].importance


def test_a_model_that_cannot_be_compiled_has_a_page(tmp_path: Path) -> None:
    html = tmp_path / "out.html"
    done = CliRunner().invoke(app, ["report", "convolution", "--html", str(html)])
    assert done.exit_code == 1
    assert "cannot be compiled" in Page(html.read_text()).text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--eval", __file__], 2, "say with --html"),
        (["--eval", "missing.json", "--html", "out.html"], 2, "'missing.json' does not exist"),
        (["--html", "no/such/folder/out.html"], 2, "a folder that exists"),
        (["--budget", "23"], 1, "at most, not 23"),
        (["--plan", "missing.json"], 2, "'missing.json' does not exist"),
        (["--calibration", "missing.txt"], 2, "'missing.txt' does not exist"),
        (["--budget", "3", "--storage-budget", "3"], 2, "exclude each other"),
    ],
)
def test_bad_input_is_a_message(arguments: list[str], code: int, message: str) -> None:
    with mock.patch.object(compiler, "find", lambda *_: pytest.fail("this takes long, and cannot be used")):
        done = kvmix(*arguments)
    assert done.exit_code == code
    said = " ".join(done.stderr.replace("│", " ").split())
    assert message in said and "Traceback" not in done.output


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model": "toy", "texts": [{"text": "a"}], "importance": []}', "nul", "7"]
)
def test_another_file_is_no_evaluation(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    done = kvmix("--eval", path, "--html", tmp_path / "out.html")
    assert done.exit_code == 1
    assert "is not what `kvmix eval --json` writes" in done.stderr


def test_a_budget_that_the_policy_cannot_meet_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    html = tmp_path / "out.html"
    with mock.patch.object(compiler, "measure", lambda *_, **__: pytest.fail("it measures")):
        done = kvmix("--policy", "kvmix", "--budget", 9, "--html", html)
    assert done.exit_code == 1 and not html.exists()
    assert "cannot be met" in done.stderr


def test_the_evaluation_of_another_model_is_refused(tmp_path: Path, text: Path) -> None:
    html = tmp_path / "out.html"
    path = evaluation(tmp_path / "results.json", ["another.layer"])
    done = kvmix("--calibration", text, "--eval", path, "--html", html)
    assert done.exit_code == 1 and not html.exists()
    assert "the evaluation is of toy" in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_it(llama: tuple[Report, Examined], tmp_path: Path) -> None:
    (tmp_path / "out.html").write_text(page("tiny:llama", *llama))
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root has none of
    command = [
        str(CHROMIUM), "--headless", "--disable-gpu", *sandbox, f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--log-level=0", f"--screenshot={tmp_path / 'out.png'}", f"file://{tmp_path}/out.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert "CONSOLE" not in done.stderr
