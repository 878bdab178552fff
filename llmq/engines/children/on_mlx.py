"""MLX, through mlx-lm."""

import time
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step


class Engine:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.version = f"mlx-lm {mlx_lm.__version__}"
        if options["device"] == "cpu":
            mx.set_default_device(mx.cpu)
        self._model, self._tokenizer = mlx_lm.load(model)
        if options["dtype"] == "float32":
            self._model.set_dtype(mx.float32)

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def top(self, tokens: list[int], count: int) -> list[dict[int, float]]:
        logits = self._model(mx.array([tokens]))[0].astype(mx.float32)
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        best = mx.argsort(-scores, axis=-1)[:, :count]
        values = mx.take_along_axis(scores, best, axis=-1)
        return [dict(zip(ids, row, strict=True)) for ids, row in zip(best.tolist(), values.tolist(), strict=True)]

    def seconds(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        start, times = time.perf_counter(), list[float]()
        for _ in generate_step(mx.array(prompt), self._model, max_tokens=new_tokens):
            times.append(time.perf_counter())
        return times[0] - start, times[-1] - times[0]

    def device_bytes(self) -> int | None:
        return int(mx.get_peak_memory())
