"""kvmix serve: OpenAI's own client asks transformers' server, and a compressed model answers."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvmix_command.main import app
from kvmix_compile.cli import serve
from kvmix_compile.models_zoo.characters import character_tokenizer
from tests.helpers.toy_llama import quantized

PROMPT = "One ring to rule them all, one ring to find them. " * 5
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
GREEDY: dict[str, Any] = {"model": "toy", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = character_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed")
    quantized().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(tokenizer: PreTrainedTokenizerFast) -> Iterator[OpenAI]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = serve.serve_model(quantized(), tokenizer, "toy", "localhost", port, wait=False)
    with OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=20) as client:
        yield client
    server.kill_server()


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
