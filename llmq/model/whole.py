"""The whole model in memory for a while, for what cannot be done block by block in reasonable time: writing text."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmq.model.skeleton import Skeleton


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


class Continuation:
    """A model as a function of the tokens so far, (B, t) int64 that grows, to the next ones' logits, (B, V).

    Keys and values of what was seen are kept where the model has a cache; without one it reads all of it again.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._past: dict[str, object] = {}

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        unseen = tokens[:, -1:] if self._past else tokens
        output = self._model(input_ids=unseen.to(self._device), use_cache=True, **self._past)
        past = getattr(output, "past_key_values", None)
        self._past = {} if past is None else {"past_key_values": past}
        logits: Tensor = output.logits[:, -1]
        return logits
