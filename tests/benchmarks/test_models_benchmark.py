"""The page of models: the benchmark behind it runs, and the page is what its results say."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.helpers.benchmark_modules import benchmark
from tests.helpers.repository import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"


def run(*arguments: str) -> None:
    """`python -m benchmarks.models` as from the repository's root."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.models", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


def test_a_decoder_works_in_both_ways(tmp_path: Path) -> None:
    """In a process of its own, as all of them are tried."""
    run("--only", "olmo2", "--output", str(tmp_path / "models.json"))
    (row,) = json.loads((tmp_path / "models.json").read_text())["results"]
    assert (row["sites"], row["text"], row["quantized"], row["backend"]) == (2, True, True, True)
    assert row["verified"] < 1e-4 and row["padded"]
    assert 0 < row["token_bytes"] < row["own_cache_bytes"] / 5
    assert not (row["refusal"] or row["backend_refusal"] or row["failures"])


@pytest.fixture
def as_talkative_as_before() -> Iterator[None]:
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.mark.usefixtures("dynamo_begins_anew", "as_talkative_as_before")
def test_a_recurrence_is_refused_in_both_ways() -> None:
    *_, row = benchmark("model_trial").try_architecture("mamba2")
    assert "no attention" in row["refusal"] and "no attention" in row["backend_refusal"]
    assert row["text"] is row["backend"] is None and not row["failures"]


def test_the_page_is_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["models", "--table", "--page", str(tmp_path / "models.md")])
    benchmark("models").main()
    assert (tmp_path / "models.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_enough_models_work_and_no_refusal_is_a_traceback() -> None:
    """What the project promises of the installed transformers."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    assert sum(bool(row["text"] and row["quantized"] and row["verified"] is not None) for row in rows) >= 60
    assert sum(row["backend"] is True for row in rows) >= 45
    assert not [row["model_type"] for row in rows if row["failures"] or False in (row["text"], row["backend"])]


def test_every_refusal_is_one_sentence() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    refusals = [row[way] for row in rows for way in ("refusal", "backend_refusal") if row[way]]
    assert refusals and not [refusal for refusal in refusals if re.search(r"[.!?]\s+[A-Z]", refusal)]
