"""A causal language model whose weights stay on disk: one block at a time has any.

transformers builds the module tree on the meta device; parameters are read when their turn comes.  What a block is
called with (masks, rotary tables, per-layer inputs) is the model's own business, so it is *recorded*: pass-through
recorders stand in for the blocks while the model runs its own forward, which touches the embedding and little else.
No model is named anywhere: the decoder blocks are the module list with the most parameters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import UnsupportedModelError
from llmq.model.block import Block
from llmq.model.weights import ModelWeights


@dataclass(frozen=True)
class Call:
    """What a block is called with: its hidden state (B, T, D) is the first of `args`, or `kwargs["hidden_states"]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def with_hidden(self, hidden: Tensor) -> "Call":
        """The same call on another hidden state."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": hidden})


class _Reached(Exception):  # noqa: N818  (it ends a forward, nothing went wrong)
    """Ends the model's forward at the block that is being recorded."""


class Skeleton:
    """The model on meta, its blocks, and a recorder of what each block is called with."""

    def __init__(self, model: nn.Module, weights: ModelWeights, device: torch.device) -> None:
        self.model = model
        self.weights = weights
        self.device = device
        path, modules = largest_module_list(model)
        self.blocks = [Block(f"{path}.{i}", module, self) for i, module in enumerate(modules)]
        for name, parameter in modules.named_parameters():
            weights.refuse_stacked(f"{path}.{name}", parameter)
        self._returns_tuple: bool | None = None  # not known before the first recording
        inside = {module for block in modules for module in block.modules()}
        for name, module in model.named_modules():
            if module not in inside and module._parameters:
                module.register_forward_pre_hook(self._filler(name))

    @property
    def max_tokens(self) -> int | None:
        """The longest text that the model was made for, if its configuration says."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has embeddings for."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.get_parameter("weight").shape[0])

    def record(self, index: int, tokens: Tensor) -> Call:
        """What block `index` is called with for `tokens` (B, T) int64, had the blocks before it changed nothing."""
        return self._record(index, tokens)[index]

    def record_all(self, tokens: Tensor) -> list[Call]:
        """What each block is called with for `tokens` (B, T) int64; all of them on the first one's hidden state."""
        calls = self._record(len(self.blocks) - 1, tokens)
        return [calls[index] for index in range(len(self.blocks))]

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits (B, T, V) for `tokens` (B, T) int64, had its last block put out `hidden` (B, T, D).

        Differentiable in `hidden`, in whatever mode torch is in.
        """
        if self._returns_tuple is None:
            self._probe()
        with self._recorders(last_output=hidden):
            logits: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return logits

    def _record(self, index: int, tokens: Tensor) -> dict[int, Call]:
        if self._returns_tuple is None:
            self._probe()
        with self._recorders() as calls, torch.no_grad():
            self._forward(tokens, stop_after=index)
        return calls

    def _forward(self, tokens: Tensor, stop_after: int) -> None:
        self._stop_after = stop_after
        try:
            self.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Reached:
            return
        raise UnsupportedModelError(f"{type(self.model).__name__} never ran its block {stop_after}")

    @contextmanager
    def _recorders(self, last_output: Tensor | None = None) -> Iterator[dict[int, Call]]:
        """While open, blocks pass their hidden state through and note what they were called with.

        With `last_output` the last block puts that out, and none ends the forward.
        """
        calls: dict[int, Call] = {}

        def recorder(index: int) -> Callable[..., Any]:
            def passthrough(*args: Any, **kwargs: Any) -> Any:
                calls[index] = Call(args, kwargs)
                if last_output is None and index == self._stop_after:
                    raise _Reached
                replaced = last_output is not None and index == len(self.blocks) - 1
                hidden = last_output if replaced else calls[index].hidden
                return (hidden,) if self._returns_tuple else hidden

            return passthrough

        for index, block in enumerate(self.blocks):
            block.module.forward = recorder(index)
        try:
            yield calls
        finally:
            for block in self.blocks:
                del block.module.forward  # the class's own forward shows again

    def _probe(self) -> None:
        """Find out whether blocks return a tuple; refuse a model whose blocks cannot be run one by one."""
        _refuse_shared_keys(self.model)
        last = len(self.blocks) - 1
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        failure: Exception | None = None
        for returns_tuple in (False, True):
            self._returns_tuple = returns_tuple
            with self._recorders() as calls, torch.no_grad():
                try:
                    self._forward(tokens, stop_after=last)
                except (LookupError, TypeError, RuntimeError, ValueError, AttributeError) as error:
                    failure = failure or error
                    continue
            if len(calls) == len(self.blocks) and all(calls[i].hidden is calls[0].hidden for i in calls):
                return
            failure = UnsupportedModelError("the hidden state changes between blocks")
        raise UnsupportedModelError(
            f"{type(self.model).__name__} cannot be replayed block by block: {failure}",
            hint="please report the architecture; rtn needs no replay",
        ) from failure

    def _filler(self, path: str) -> Callable[[nn.Module, Any], None]:
        """A hook that reads a module's own parameters when it is first run."""

        def fill_now(module: nn.Module, _: Any) -> None:
            if any(p is not None and p.is_meta for p in module._parameters.values()):
                self.weights.fill(path, module, self.device)

        return fill_now


def _refuse_shared_keys(model: nn.Module) -> None:
    """Some blocks (of Gemma 3n, say) attend to keys and values of earlier ones, which replay does not carry along."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    sharing = getattr(config, "num_kv_shared_layers", 0)
    if sharing:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be replayed block by block: its last {sharing} blocks share the keys and "
            "values of earlier ones",
            hint="rtn needs no replay",
        )


def largest_module_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the module list that holds the most parameters."""
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks", hint="only decoder stacks can be quantized"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def build(folder: Path, *, dtype: torch.dtype, remote_code: bool) -> nn.Module:
    """The causal language model of a checkpoint's config.json, every parameter on meta; buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder, remote_code=remote_code)
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=remote_code)
    except Exception as error:  # a wrong value in config.json fails wherever the model first uses it
        raise UnsupportedModelError(
            f"transformers cannot build the model that {folder / 'config.json'} describes: {_first_line(error)}",
            hint="is config.json complete, and of a version that this transformers knows?",
        ) from error
    return model.eval().requires_grad_(False)


def load_config(folder: Path, *, remote_code: bool) -> Any:
    """The transformers configuration of a checkpoint; refuses what is no causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # strict validation, missing code and unknown types each raise something of their own
        needs_code = "trust_remote_code" in str(error)
        hint = "pass --trust-remote-code if you trust its author" if needs_code else "a newer transformers may know it"
        raise UnsupportedModelError(
            f"transformers cannot read the configuration in {folder}: {error}", hint=hint
        ) from error
    if remote_code and getattr(config, "auto_map", None):
        return config
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    causal = {names} if isinstance(names, str) else set(names)
    architectures = set(getattr(config, "architectures", None) or causal)
    if not causal & architectures or getattr(config, "is_encoder_decoder", False):
        found = ", ".join(sorted(architectures)) or config.model_type
        raise UnsupportedModelError(
            f"{folder} holds {found}, which is no causal language model",
            hint="llmq quantizes decoders that generate text (…ForCausalLM); encoders and encoder-decoders it does not",
        )
    return config


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
