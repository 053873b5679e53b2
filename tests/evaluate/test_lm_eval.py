"""EleutherAI's harness: its scores are those of a model that reads its cache, on a task that is made here."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from kvmix_compile import KVMixCache  # noqa: E402
from kvmix_compile.evaluate.lm_eval import KVMixLM  # noqa: E402
from kvmix_compile.models_zoo.characters import character_tokenizer  # noqa: E402
from tests.helpers.cache_argument import with_cache  # noqa: E402
from tests.helpers.toy_llama import RECENT, SINKS, ids, original, quantized, unquantized  # noqa: E402

QUESTIONS = [{"context": "sand and sea " * (7 + number), "choices": [" yes", " no"]} for number in range(3)]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "sand"
generation_kwargs: {until: ["?"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TaskManager]:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, task in (("choice", CHOICE), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        yield TaskManager(include_path=str(folder), include_defaults=False)


def samples(model: HFLM, task: str, tasks: TaskManager) -> list[dict]:
    results = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=tasks, bootstrap_iters=0)
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def loglikelihoods(model: HFLM, tasks: TaskManager) -> list[list[float]]:
    return [[response[0][0] for response in sample["resps"]] for sample in samples(model, "choice", tasks)]


@pytest.fixture(scope="module")
def compressed() -> KVMixLM:
    return KVMixLM(original(), tokenizer=character_tokenizer(), plan=quantized().kvmix_plan, batch_size=2)


def test_a_likelihood_is_that_of_reading_token_by_token(compressed: KVMixLM, tasks: TaskManager) -> None:
    for sample in samples(compressed, "choice", tasks):
        for (context, choice), response in zip(sample["arguments"], sample["resps"], strict=True):
            text = torch.tensor([compressed.tok_encode(context + choice)])
            past, first = KVMixCache(compressed.model), len(compressed.tok_encode(context.rstrip()))
            with torch.no_grad():
                logits = [compressed.model(token, **with_cache(past)).logits[0, 0] for token in text[0, :, None, None]]
            expected = sum(
                logits[place - 1].log_softmax(-1)[text[0, place]].item() for place in range(first, text.shape[1])
            )
            assert response[0][0] == pytest.approx(expected, abs=2e-2)


def test_the_stock_class_would_score_the_original(compressed: KVMixLM, tasks: TaskManager) -> None:
    """Why there is a class of its own."""
    tokenizer = character_tokenizer()
    originals = loglikelihoods(HFLM(original(), tokenizer=tokenizer), tasks)
    stock = loglikelihoods(HFLM(quantized(), tokenizer=tokenizer), tasks)
    torch.testing.assert_close(torch.tensor(stock), torch.tensor(originals), rtol=1e-4, atol=1e-3)
    difference = torch.tensor(loglikelihoods(compressed, tasks)) - torch.tensor(originals)
    assert difference.abs().max() > 0.1


def test_at_16_bits_scores_are_the_originals(tasks: TaskManager) -> None:
    tokenizer = character_tokenizer()
    lossless = KVMixLM(original(), tokenizer=tokenizer, plan=unquantized(quantized().kvmix_plan), batch_size=3)
    expected = loglikelihoods(HFLM(original(), tokenizer=tokenizer), tasks)
    torch.testing.assert_close(
        torch.tensor(loglikelihoods(lossless, tasks)), torch.tensor(expected), rtol=1e-4, atol=1e-3
    )


def test_it_writes_answers(compressed: KVMixLM, tasks: TaskManager) -> None:
    for sample in samples(compressed, "writing", tasks):
        prompt = torch.tensor([compressed.tok_encode(sample["doc"]["context"])])
        written = compressed.model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
        expected = compressed.tok_decode(written[0, prompt.shape[1] :].tolist())
        assert sample["resps"][0][0] == expected.split("?")[0]


def test_the_harness_finds_it_by_name_and_loads_a_folder(tmp_path: Path) -> None:
    assert get_model("kvmix") is KVMixLM
    original().save_pretrained(tmp_path)
    loaded = KVMixLM.create_from_arg_string(
        f"pretrained={tmp_path},storage_budget=3.5,sinks={SINKS},recent={RECENT}",
        {"tokenizer": character_tokenizer(), "calibration": ids(2, 128), "device": "cpu"},
    )
    assert loaded.model.kvmix_plan.storage_bits <= 3.5
    assert loaded.model.kvmix_plan.exact_chunks
