"""An ONNX model behind transformers' `generate`, so that it samples, stops and streams like all other models."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from llmq.runtime.load import generation_settings
from llmq.runtime.onnx_model import Arrays, OnnxModel


class OnnxForGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is not typed
    """The graph of a folder in ONNX Runtime. It keeps its cache itself: `generate` gives all tokens at each step."""

    main_input_name = "input_ids"

    def __init__(self, folder: Path) -> None:
        super().__init__(AutoConfig.from_pretrained(folder))
        self._graph = OnnxModel(folder)
        self._place = nn.Parameter(torch.empty(0), requires_grad=False)  # a model of transformers has a device
        self._seen = torch.empty(0, 0, dtype=torch.int64)
        self._cache: Arrays | None = None
        if (folder / "generation_config.json").is_file():
            self.generation_config = generation_settings(folder)
        self.generation_config.use_cache = False

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        """Logits (B, new tokens, V) float32 of the tokens that were not in the last call."""
        seen = self._seen.shape[1]
        continues = 0 < seen < input_ids.shape[1] and torch.equal(self._seen, input_ids[:, :seen])
        start, cache = (seen, self._cache) if continues else (0, None)
        logits, self._cache = self._graph.run(input_ids[:, start:].numpy(), cache, start)
        self._seen = input_ids
        return CausalLMOutput(logits=torch.from_numpy(logits))
