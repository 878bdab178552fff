"""The logits of an ONNX file, as its engine computes them: what is measured is the file and the engine together."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.index import ONNX_FILE
from llmq.evaluation import scoring
from llmq.evaluation.engine_source import EngineSource
from llmq.evaluation.trajectories import greedy
from llmq.report.events import OnEvent, Progress, evaluating, ignore
from llmq.runtime import ONNXRUNTIME
from llmq.runtime.onnx_model import Arrays, OnnxModel, language_config


class OnnxSource(EngineSource):
    """A `Source` that ONNX Runtime or OpenVINO runs on the CPU; logits are scored on `device`."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        name: str = "",
        on_event: OnEvent = ignore,
        engine: str | None = None,
    ) -> None:
        super().__init__(device, name, on_event)
        self._model = OnnxModel(folder, engine or ONNXRUNTIME)
        self.activations = "as in the file"
        self.note: str | None = f"{folder} was run by {self._model.engine}"
        self.whole_bytes = onnx_bytes(folder)
        length = language_config(folder).get("max_position_embeddings")
        self.max_tokens = length if isinstance(length, int) else None
        self.vocabulary = self._model.vocabulary

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        for tokens in self._windows.split(min(together, scoring.windows_per_batch(self._windows))):
            logits, _ = self._model.run(tokens.numpy())
            done += len(tokens)
            self._on_event(Progress(evaluating(self._name), done, len(self._windows)))
            yield tokens, torch.from_numpy(logits).to(self.device)

    def continue_greedily(self, prompts: Tensor, ends: frozenset[int]) -> Tensor:
        return greedy(_Continuation(self._model), prompts, ends)


class _Continuation:
    """A model as a function from the tokens so far, (B, t) int64 with growing t, to the logits of the next, (B, V)."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._cache: Arrays | None = None
        self._seen = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        logits, self._cache = self._model.run(tokens[:, self._seen :].numpy(), self._cache, self._seen)
        self._seen = tokens.shape[1]
        return torch.from_numpy(logits[:, -1])


def onnx_bytes(folder: Path) -> int:
    """The size of the graph and its weights on disk."""
    return sum(file.stat().st_size for file in folder.glob(f"{ONNX_FILE}*"))
