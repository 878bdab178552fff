"""ONNX Runtime, for models that `llmq convert --to onnx` has written. It needs llmq, which knows their inputs."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from llmq.runtime.onnx_model import OnnxModel


class Engine:
    name = "onnxruntime"

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        transformers.utils.logging.set_verbosity_error()
        self._model = OnnxModel(Path(model), self.name)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.version = self._model.engine

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def top(self, tokens: list[int], count: int) -> list[dict[int, float]]:
        logits = self._model.run(np.array([tokens]))[0][0].astype(np.float64)
        scores = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        best = np.argsort(-scores, axis=-1)[:, :count]
        return [{int(token): float(row[token]) for token in ids} for ids, row in zip(best, scores, strict=True)]

    def seconds(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        start, times = time.perf_counter(), list[float]()
        tokens, cache, seen = np.array([prompt]), None, 0
        for _ in range(new_tokens):
            logits, cache = self._model.run(tokens, cache, seen)
            seen += tokens.shape[1]
            tokens = logits[:, -1:].argmax(-1)
            times.append(time.perf_counter())
        return times[0] - start, times[-1] - times[0]

    def device_bytes(self) -> int | None:
        return None
