"""The whole model in memory, to generate text, which would take too long block by block."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.build.skeleton import Skeleton


@contextmanager
def in_memory(skeleton: Skeleton) -> Iterator[nn.Module]:
    """The skeleton's model with all of its weights, on its device; afterwards the weights are freed.

    Modules outside the blocks are read when they are first run, as always.
    """
    try:
        for block in skeleton.blocks:
            block.load()
        yield skeleton.model
    finally:
        for module in skeleton.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def weight_bytes(skeleton: Skeleton) -> int:
    """Bytes of the weights in memory; a tied weight counts once for each place where it is used."""
    parameters = skeleton.model.named_parameters(remove_duplicate=False)
    return sum(parameter.numel() * parameter.element_size() for _, parameter in parameters)


def cache_bytes(skeleton: Skeleton) -> int:
    """Approximate bytes of the keys and values of one token, for full attention in every block.

    Where blocks have different heads, all count as the largest."""
    config = skeleton.model.config.get_text_config()  # type: ignore[union-attr, operator]
    embedding = skeleton.model.get_input_embeddings().get_parameter("weight")  # type: ignore[operator]

    def width(of_block: Any) -> int:
        heads = getattr(of_block, "num_attention_heads", None) or 1
        shared = getattr(of_block, "num_key_value_heads", None) or heads
        return int(shared * (getattr(of_block, "head_dim", None) or embedding.shape[1] // heads))

    widest = max(map(width, getattr(config, "per_layer_config", None) or [config]))
    return int(2 * len(skeleton.blocks) * widest * embedding.element_size())


CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument; remote code may use the old name


def cache_argument(model: nn.Module) -> str | None:
    """The name of the argument of `model` for keys and values of earlier tokens; None if there is none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def returned_cache(output: Any) -> object | None:
    """The keys and values in the output of a model, under any of their names; None if there are none."""
    return next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)


class Continuation:
    """A model as a function from the tokens so far, (B, t) int64 with growing t, to the logits of the next, (B, V).

    If the model has a cache, keys and values of earlier tokens are kept; else all tokens are run again each time.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._name = cache_argument(model)
        self._cache: object | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        cached = {} if self._name is None or self._cache is None else {self._name: self._cache}
        unseen = tokens[:, -1:] if cached else tokens
        output = self._model(input_ids=unseen.to(self._device), use_cache=True, **cached)
        self._cache = returned_cache(output)
        logits: Tensor = output.logits[:, -1]
        return logits
