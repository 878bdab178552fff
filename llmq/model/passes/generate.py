"""The whole model in memory for a while, for what cannot be done block by block in reasonable time: writing text."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.build.skeleton import Skeleton


@contextmanager
def in_memory(skeleton: Skeleton) -> Iterator[nn.Module]:
    """The skeleton's model with all of its weights, on its device; they are gone from memory afterwards.

    What lies outside the blocks is read when it is first run, here as always.
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
    """What the weights take in memory, those that are tied once for each place where they are used."""
    parameters = skeleton.model.named_parameters(remove_duplicate=False)
    return sum(parameter.numel() * parameter.element_size() for _, parameter in parameters)


def cache_bytes(skeleton: Skeleton) -> int:
    """About what keys and values of one token take: full attention in every block."""
    config = skeleton.model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = getattr(config, "num_attention_heads", None) or 1
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    itemsize = next(skeleton.model.parameters()).element_size()
    return int(2 * len(skeleton.blocks) * shared * width * itemsize)


CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument; other models' own code may lag


def cache_argument(model: nn.Module) -> str | None:
    """The name by which `model` takes keys and values of earlier tokens; None if it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def returned_cache(output: Any) -> object | None:
    """The keys and values in what a model returned, whatever their name; None if there are none."""
    return next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)


class Continuation:
    """A model as a function of the tokens so far, (B, t) int64 that grows, to the next ones' logits, (B, V).

    Keys and values of earlier tokens are kept where the model has a cache; without one it reads all tokens again.
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
