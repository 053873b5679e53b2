"""What MODEL may be: a folder, a file of weights, or a name, and what is said where it is none."""

from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from kvmix_compile.cli import loading
from kvmix_compile.cli.loading import LoadError, load_model
from kvmix_compile.models_zoo import gguf
from kvmix_compile.models_zoo.characters import character_tokenizer
from kvmix_compile.models_zoo.tiny import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def weights(name: str) -> Any:
    return load_model(name).model.state_dict()["model.embed_tokens.weight"]


def test_a_file_of_weights_is_loaded_with_what_lies_beside_it(folder: Path) -> None:
    found = load_model(str(folder / "model.safetensors"))
    assert torch.equal(weights(str(folder / "model.safetensors")), weights(str(folder)))
    assert found.require_tokenizer()("a").input_ids == [ord("a")]
    (folder / "config.json").unlink()
    with pytest.raises(LoadError, match="it holds weights alone, so put the config.json of its model beside it"):
        load_model(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-model", "no model of this name was downloaded before, and huggingface.co cannot be reached"),
        ("no_such/owner", "no model of this name was downloaded before, and huggingface.co cannot be reached"),
        ("no/such/folder", "there is no such folder"),
        ("./nowhere", "there is no such folder"),
        ("nowhere.gguf", "there is no such file"),
        ("nowhere.safetensors", "there is no such file"),
        ("smolm2", "Did you mean smollm2?"),
    ],
)
def test_a_name_that_is_none_is_soon_refused(name: str, said: str) -> None:
    start = perf_counter()
    with pytest.raises(LoadError, match="cannot load") as raised:
        load_model(name)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert perf_counter() - start < 1


def test_a_name_that_the_hub_does_not_know_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **options: Any) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(HfApi, "model_info", unknown)
    with pytest.raises(LoadError, match="on huggingface.co no such model that you may see"):
        load_model("no-such-model")


def test_what_was_downloaded_is_loaded_without_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda name, file: str(folder / file))
    monkeypatch.setattr(loading, "_from_pretrained", lambda name, **options: loaded.extend((name, options)))
    load_model("owner/name")
    assert loaded == ["owner/name", {"local_files_only": True}]
    assert "owner/name is loaded as it was downloaded before" in capsys.readouterr().err


def test_a_gguf_file_needs_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(gguf, "READERS", ("a_reader_nobody_has",))
    with pytest.raises(LoadError, match=r"model\.gguf needs more packages. Run: pip install a_reader_nobody_has"):
        load_model(str(tmp_path / "model.gguf"))


def test_a_damaged_gguf_file_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no weights")
    with pytest.raises(LoadError, match=r"cannot load .*model\.gguf"):
        load_model(str(tmp_path / "model.gguf"))
