"""A Llama of given dimensions with random weights, without a download or a file.

Tensors are made when they are read, on the device, each from a separate seed, so that a model of 16 GB takes a few
launches and all blocks are different.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.plan import Llama

SPREAD = 0.02  # of the weights
CONTEXT = 8192


def configuration(dimensions: Llama, blocks: int) -> Any:
    """The transformers configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=dimensions.hidden,
        intermediate_size=dimensions.intermediate,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.key_heads,
        vocab_size=dimensions.vocabulary,
        num_hidden_layers=blocks,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def on_meta(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with every parameter on meta; the rotary tables, which are in no checkpoint, are real."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model.eval().requires_grad_(False)


class RandomTensors:
    """The tensors of a model by name, as in a checkpoint."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
        self._device = device

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def read(self, name: str) -> Tensor:
        """Ones for a norm, else normal with standard deviation 0.02; always the same for one name."""
        shape, dtype = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, dtype=dtype, device=self._device, generator=generator).mul_(SPREAD)


def write_config(folder: Path, config: Any) -> None:
    """config.json, for code that reads it from a folder."""
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
