"""kvmix serve: OpenAI's own client asks transformers' server, and a compressed model answers; the page in a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from openai import APIError, OpenAI
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvmix_command.main import app
from kvmix_compile import KVMixCache
from kvmix_compile.cli import serve
from kvmix_compile.cli.watch import Held, Watched
from kvmix_compile.models_zoo.characters import character_tokenizer
from tests.helpers.chats import chat_tokenizer
from tests.helpers.toy_llama import RECENT, SINKS, ids, original, quantized

PROMPT = "One ring to rule them all, one ring to find them. " * 5
GREEDY: dict[str, Any] = {"model": "toy", "max_tokens": 12, "temperature": 0}
CHROMIUM = shutil.which("chromium")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed")
    quantized().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(tokenizer: PreTrainedTokenizerFast) -> Iterator[OpenAI]:
    port = free_port()
    server = serve.serve_model(quantized(), tokenizer, "toy", "localhost", port, wait=False)
    with OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=20) as client:
        yield client
    server.kill_server()


def get(client: OpenAI, path: str) -> str:
    with urlopen(f"{str(client.base_url).removesuffix('/v1/')}{path}") as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def expected(tokenizer: PreTrainedTokenizerFast) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    written = quantized().generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


def test_it_has_one_model(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]


def test_a_prompt_is_continued(client: OpenAI, expected: str) -> None:
    assert client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text == expected


def test_a_chat_is_answered_and_streamed(client: OpenAI, expected: str) -> None:
    chat = {"messages": [{"role": "user", "content": PROMPT}], **GREEDY}
    answer = client.chat.completions.create(**chat)
    assert answer.choices[0].message.content == expected
    assert answer.usage and answer.usage.completion_tokens == 12
    parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(stream=True, **chat)]
    assert "".join(parts) == expected and len(parts) > 3


def test_the_command_serves_what_it_compressed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(serve, "serve_model", lambda *arguments: served.extend(arguments))
    done = CliRunner().invoke(app, ["serve", str(folder), "--port", "8123"])
    assert done.exit_code == 0, done.output
    model, _, name, host, port = served
    assert model.kvmix_plan == quantized().kvmix_plan
    assert (name, host, port) == (str(folder), "localhost", 8123)
    assert "http://localhost:8123/v1" in done.stderr


def test_without_the_server_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    done = CliRunner().invoke(app, ["serve", "tiny:llama"])
    assert done.exit_code == 1 and "pip install 'kvmix-compile[serve]'" in done.stderr


def test_a_compressed_folder_is_generated_from_as_it_is(folder: Path) -> None:
    done = CliRunner().invoke(app, ["generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "kvmix"


def test_the_page_needs_nobody_else(client: OpenAI) -> None:
    page = get(client, "/")
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?:|url\(|@import|innerHTML", page)
    assert set(re.findall(r"""["'](/[a-z]\S*)["']""", page)) == {
        "/kvmix/cache", "/v1/chat/completions", "/v1/completions",
    }  # fmt: skip


def test_it_tells_what_the_cache_holds(client: OpenAI) -> None:
    usage = client.completions.create(prompt=PROMPT, **GREEDY).usage
    assert usage is not None
    told = json.loads(get(client, "/kvmix/cache"))
    # The last token is written, and read by none.
    assert told["tokens"] == usage.total_tokens - 1
    assert told["sinks"] == SINKS and 0 < told["recent"] <= RECENT
    assert told["sinks"] + told["packed"] + told["recent"] == told["tokens"]
    assert told["bytes"] == quantized().kvmix_plan.cache_bytes(told["tokens"], dtype=torch.float32)
    assert told["bits"] == pytest.approx(16 * told["bytes"] / told["unquantized_bytes"])
    sites = quantized().kvmix_plan.sites
    assert [(site["layer"], site["key_bits"]) for site in told["layers"]] == [
        (site.layer, site.key.mean_bits) for site in sites
    ]
    assert (told["model"], told["chats"], told["generating"]) == ("toy", True, False)


def test_it_tells_of_the_cache_while_it_is_filled() -> None:
    watched, seen = Watched(quantized()), list[Held]()

    class Streamer:
        def put(self, _: object) -> None:
            assert watched.is_generating
            seen.append(watched.held())

        def end(self) -> None:
            pass

    given = ids(1, 100)
    assert watched.held() == Held.of(KVMixCache(quantized())) and watched.held().tokens == 0
    watched.model.generate(given, streamer=Streamer(), max_new_tokens=5, do_sample=False)
    assert [held.tokens for held in seen] == [0, 100, 101, 102, 103, 104]
    assert not watched.is_generating and watched.held() == seen[-1]
    assert "generate" not in vars(quantized()), "the model that was given has changed"


def test_what_is_refused_is_an_error_and_leaves_the_figures(client: OpenAI) -> None:
    before = get(client, "/kvmix/cache")
    with pytest.raises(APIError) as refused:
        list(client.completions.create(prompt=PROMPT * 3, stream=True, **GREEDY))
    assert "512 positions" in str(refused.value.body)
    assert json.loads(get(client, "/kvmix/cache")) == json.loads(before)


def test_without_a_cache_nothing_is_told_of_it() -> None:
    watched = Watched(quantized())
    watched.model.generate(ids(1, 100), max_new_tokens=2, do_sample=False, use_cache=False)
    assert watched.held().tokens == 0


def test_until_it_is_interrupted_it_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the page, and for a model without a chat template."""
    uvicorn = pytest.importorskip("uvicorn")
    ran: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: ran.append(server.config.app))
    serve.serve_model(quantized(), character_tokenizer(), "toy", "localhost", 8123)
    (app,) = ran
    routes = {route.path: route for route in app.routes if hasattr(route, "endpoint")}
    assert {"/", "/kvmix/cache", "/v1/completions"} <= set(routes)
    assert routes["/kvmix/cache"].endpoint()["chats"] is False


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_page(client: OpenAI, tmp_path: Path) -> None:
    client.completions.create(prompt=PROMPT, **GREEDY)
    tokens = json.loads(get(client, "/kvmix/cache"))["tokens"]
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root has none of
    address = str(client.base_url).removesuffix("v1/")
    command = [
        str(CHROMIUM), "--headless", "--disable-gpu", *sandbox, f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000", "--dump-dom", address,
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f'<h2 id="tokens">{tokens} tokens</h2>' in shown
    assert shown.count('class="held"') == len(quantized().kvmix_plan.sites)


def test_transformers_own_server_answers_with_a_compressed_folder(folder: Path, expected: str) -> None:
    port = free_port()
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(folder), "--trust-remote-code", "--port", str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=20) as client,
    ):
        try:
            answer = client.completions.create(prompt=PROMPT, **GREEDY | {"model": str(folder)})
        finally:
            server.terminate()
    assert answer.choices[0].text == expected
    given = character_tokenizer()(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    texts = [model.generate(given, max_new_tokens=12, do_sample=False).tolist() for model in (quantized(), original())]
    assert texts[0] != texts[1], "the original would have answered the same"
