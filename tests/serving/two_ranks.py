"""A tiny model on two ranks, over gloo; test_ranks.py starts it. Writes what was said to FOLDER/said.json.

python -m tests.serving.two_ranks FOLDER
"""

import json
import os
import sys
from pathlib import Path

# The ranks are processes of their own, and the engine too.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"

from tests.serving.toy import Toy, engine, ids, written

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with engine(Toy("llama", folder), tensor_parallel_size=2) as llm:
        found = [one for text in (ids(150), ids(150)) for one in written(llm, [text, ids(20, 9)])]
    said = [
        {
            "prompt": one.prompt_token_ids,
            "cached": one.num_cached_tokens,
            "tokens": list(one.outputs[0].token_ids),
            "log_probabilities": [
                step[token].logprob
                for step, token in zip(one.outputs[0].logprobs, one.outputs[0].token_ids, strict=True)
            ],
        }
        for one in found
    ]
    (folder / "said.json").write_text(json.dumps(said))
