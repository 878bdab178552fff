"""The logits of a .gguf file, as llama.cpp computes them: what is measured is the file and the engine together."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmq.evaluation.engine_source import EngineSource
from llmq.evaluation.trajectories import greedy
from llmq.gguf.container import Container
from llmq.report.events import OnEvent, Progress, evaluating, ignore
from llmq.runtime.llama_cpp_model import LlamaCppModel, version


class LlamaCppSource(EngineSource):
    """A `Source` that llama.cpp runs on the CPU, one sequence after the other; logits are scored on `device`."""

    def __init__(self, file: Path, device: torch.device, name: str = "", on_event: OnEvent = ignore) -> None:
        super().__init__(device, name, on_event)
        self._model = LlamaCppModel(file)
        self.activations = "8 bits in front of quantized weights"
        self.note: str | None = f"{file.name} was run by {version()}"
        tensors = Container(file).tensors.values()
        self.whole_bytes = sum(4 * math.prod(info.shape) for info in tensors)
        self.max_tokens: int | None = self._model.max_tokens
        self.vocabulary = self._model.vocabulary

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        for done, tokens in enumerate(self._windows, 1):
            logits = torch.from_numpy(self._model.logits(tokens.numpy()))
            self._on_event(Progress(evaluating(self._name), done, len(self._windows)))
            yield tokens[None], logits[None].to(self.device)

    def continue_greedily(self, prompts: Tensor, ends: frozenset[int]) -> Tensor:
        def following(tokens: Tensor) -> Tensor:
            return torch.stack([torch.from_numpy(self._model.logits(row.numpy())[-1]) for row in tokens])

        return greedy(following, prompts, ends)
