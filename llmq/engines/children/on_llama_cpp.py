"""llama.cpp, through the package xllamacpp: its server in this process, on a port of this machine with a secret key."""

import json
import os
import secrets
import urllib.request
from typing import Any

import xllamacpp


class Engine:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.version = f"llama.cpp, xllamacpp {xllamacpp.__version__}"
        parameters = xllamacpp.CommonParams()
        parameters.model.path = model
        parameters.n_ctx = options["context"]
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0 if options["device"] == "cpu" else -1
        if threads := os.environ.get("OMP_NUM_THREADS"):  # its threads wait for each other in busy loops
            parameters.cpuparams.n_threads = int(threads)
        parameters.verbosity = -1
        parameters.warmup = False
        self._key = secrets.token_hex(16)
        parameters.api_keys = [self._key]
        self.server = xllamacpp.Server(parameters)

    def tokenize(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", body, headers)
        with urllib.request.urlopen(request) as response:
            tokens: list[int] = json.load(response)["tokens"]
        return tokens

    def _complete(self, tokens: list[int], **settings: Any) -> dict[str, Any]:
        request = {"prompt": tokens, "temperature": 0, "ignore_eos": True, **settings}
        reply: dict[str, Any] = self.server.handle_completions(request)
        if "error" in reply:
            raise RuntimeError(f"llama.cpp: {reply['error']}")
        return reply

    def top(self, tokens: list[int], count: int) -> list[dict[int, float]]:
        rows = []
        for end in range(1, len(tokens) + 1):  # the server gives probabilities of new tokens only; it keeps its cache
            reply = self._complete(tokens[:end], n_predict=1, n_probs=count)
            known = reply["choices"][0]["logprobs"]  # None after a token that is a part of a character
            best = known["content"][0]["top_logprobs"] if known else []
            rows.append({entry["id"]: entry["logprob"] for entry in best})
        return rows

    def seconds(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        timings = self._complete(prompt, n_predict=new_tokens, cache_prompt=False)["timings"]
        return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000

    def device_bytes(self) -> int | None:
        return None
