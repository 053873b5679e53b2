"""The benchmark of throughput at equal memory: batches are as large as fit, and hold what they say."""

import pytest
import torch
from transformers import DynamicCache

import kvmix_compile
from kvmix_compile.evaluate.configurations import Compiled, Configuration
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.benchmark_modules import benchmark
from tests.helpers.toy_llama import ids

throughput = benchmark("throughput")

TOKENS, ROUNDS, STEPS = 300, 2, 3
GENERATED = throughput.generated_tokens(ROUNDS, STEPS)


@pytest.fixture(scope="module")
def prompt() -> throughput.Prompt:
    return throughput.Prompt.read(tiny("llama"), ids(1, TOKENS))


def test_each_decodes_as_many_rows_as_fit(prompt) -> None:
    model = tiny("llama")
    compiled = kvmix_compile.apply(model, budget=2.3)
    contenders = [*throughput.configurations(model, TOKENS + GENERATED, []), Compiled("kvmix", compiled)]
    row = sum(tensor.nbytes for state in prompt.states for tensor in state) * (TOKENS + GENERATED) // TOKENS
    rows, left_out = throughput.measure(contenders, prompt, 3.5 * row, ROUNDS, STEPS)
    found = {row["cache"]: row for row in rows}
    assert not left_out and list(found) == ["dynamic", "static", "kvmix"]
    assert found["dynamic"]["bytes_a_row"] == row and found["static"]["bytes_a_row"] == pytest.approx(row, rel=1e-3)
    assert found["dynamic"]["batch"] == found["static"]["batch"] == 3 and found["dynamic"]["ratio_to_dynamic"] == 1
    held = compiled.kvmix_plan.cache_bytes(TOKENS + GENERATED, 1, torch.float32)
    assert found["kvmix"]["bytes_a_row"] == pytest.approx(held, rel=0.01)
    assert found["kvmix"]["batch"] == 3.5 * row // found["kvmix"]["bytes_a_row"] > 3


def test_every_row_continues_the_prompt(prompt) -> None:
    model = tiny("llama")
    lossless = kvmix_compile.apply(model, budget=16, verify=False)
    decoders = [
        throughput.Decoder(configuration, prompt, 1e7, GENERATED)
        for configuration in (Configuration("dynamic", model), Compiled("kvmix", lossless))
    ]
    for decoder in decoders:
        with torch.no_grad():
            decoder.decode(3, timed=True)
        assert (decoder.next_token == decoder.next_token[0]).all() and len(decoder.seconds) == 3
    assert decoders[0].next_token[0] == decoders[1].next_token[0]


def test_one_for_which_a_row_is_too_much_is_left_out_and_says_so(prompt) -> None:
    rows, left_out = throughput.measure([Configuration("dynamic", tiny("llama"))], prompt, 1000, 1, 1)
    assert not rows and "one row takes" in left_out["dynamic"]


def test_all_that_a_cache_holds_is_counted_once(prompt) -> None:
    cache = DynamicCache()
    keys, values = prompt.states[0]
    cache.update(keys, values, 0)
    assert throughput.tensor_bytes(cache) == keys.nbytes + values.nbytes
    shared = DynamicCache()
    whole = torch.cat([keys, values])
    shared.update(whole[:1], whole[1:], 0)
    assert throughput.tensor_bytes(shared) <= whole.nbytes
