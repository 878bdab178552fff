"""A causal language model whose weights are on disk: only one block at a time is loaded.

transformers builds the module tree on the meta device; parameters are read when they are needed. The arguments of a
block (masks, rotary tables, per-layer inputs) depend on the model, so they are *recorded*: the forwards of all blocks
are replaced by recorders that pass the hidden state through, and the model's own forward is run, which needs little
more than the embedding. There is no list of models: the decoder blocks are the module list with the most parameters
that text runs through.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import ConfigError, UnsupportedModelError
from llmq.model.analyse import meta_run
from llmq.model.build import one_by_one
from llmq.model.build.block import Block, Call, is_plain_linear
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.compute_device import computing_on
from llmq.model.build.layout import Layout
from llmq.model.build.module_tree import build as build
from llmq.model.build.module_tree import load_config as load_config
from llmq.numerics.scheme import InputScheme

SHARED = "its weight is shared with another layer"
PART = "the checkpoint stores its weight as a part of another tensor"
CONVERTED = "the checkpoint stores its weight in another form or without the name of a weight"
MOST_RETURNED = 3  # the most values that a block returns


class _Reached(Exception):  # noqa: N818  (it ends a forward and is not an error)
    """Ends the model's forward at the block that is recorded, or at the head."""


class Skeleton:
    """The model on meta, its blocks, and a recorder of the arguments of each block.

    special_layers  path -> reason, of linear layers in the blocks that must not be packed; they are in no `linears`
    """

    def __init__(self, model: nn.Module, weights: ModelWeights, device: torch.device) -> None:
        self.model = model
        self.weights = weights
        self.device = device
        config = getattr(model, "config", None)
        if getattr(config, "output_router_logits", False):  # for an auxiliary loss; recorded blocks make no such logits
            model.config.output_router_logits = False  # type: ignore[union-attr]
        path, modules = largest_module_list(model)
        self.blocks = [Block(i, f"{path}.{i}", module, weights, device) for i, module in enumerate(modules)]
        for name, parameter in modules.named_parameters():
            weights.refuse_stacked(f"{path}.{name}", parameter)
        linears = {path: linear for block in self.blocks for path, linear in block.linears.items()}
        # Before hooks read parameters: see `_filler`.
        with meta_run.counted(modules) as runs, one_by_one.returning_nothing_else(modules) as plain:
            self.special_layers = meta_run.special_layers(model, linears)
        self._repeated = [block.path for block in self.blocks if runs[block.module] > 1]
        self._return_more = not plain.issuperset(modules)
        self.special_layers |= {path: SHARED for path in linears if weights.is_shared(f"{path}.weight")}
        self.special_layers |= {path: CONVERTED for path in linears if weights.is_converted(f"{path}.weight")}
        self.special_layers |= {path: PART for path in linears if weights.is_part(f"{path}.weight")}
        for block in self.blocks:
            block.leave(self.special_layers)
        self._returned: int | None = None  # see `_probe`; unknown before the first recording
        self._reading = True  # see `without_reading`
        inside = {module for block in modules for module in block.modules()}
        for name, module in model.named_modules():
            if module not in inside and module._parameters:
                module.register_forward_pre_hook(self._filler(name))

    @property
    def max_tokens(self) -> int | None:
        """The maximum context length in tokens, if the configuration has one."""
        config: Any = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        longest: int | None = getattr(text, "max_position_embeddings", None)
        return longest if longest and longest > 0 else None

    @property
    def vocabulary(self) -> int:
        """The number of tokens that have an embedding."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.get_parameter("weight").shape[0])

    def alike(self) -> list[list[str]]:
        """Lists of paths of linear layers that engines run as one: one list per layer of experts."""
        return [
            [linear for linear in block.linears if linear.startswith(f"{path}.")]
            for block in self.blocks
            for path in block.experts
        ]

    def read_ahead(self, index: int) -> None:
        """Start to read block `index`, if it exists, while another block is processed."""
        if 0 <= index < len(self.blocks):
            self.weights.expect(self.blocks[index].stored_names())

    def quantize_inputs(self, schemes: Mapping[str, InputScheme]) -> None:
        """From now on, quantize the inputs of these linear layers of the blocks, by path, in every pass; no others.

        Raises ConfigError for a path that does not belong to a linear layer in a block, for a scheme that cannot be
        simulated, and for experts of one layer with different schemes.
        """
        unknown = sorted(set(schemes).difference(*(block.linears for block in self.blocks)))
        if unknown:
            raise ConfigError(
                f"{unknown[0]} is not a linear layer of a block, so its inputs cannot be quantized",
                hint=f"paths look like {next((path for block in self.blocks for path in block.linears), 'none here')}",
            )
        for block in self.blocks:
            block.quantize_inputs({path: scheme for path, scheme in schemes.items() if path in block.linears})

    @contextmanager
    def float_inputs(self) -> Iterator[None]:
        """While open, no input is quantized in any block."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.float_inputs())
            yield

    @contextmanager
    def without_reading(self) -> Iterator[None]:
        """While open, modules outside of the blocks are not read when they run: for a run on the meta device."""
        self._reading = False
        try:
            yield
        finally:
            self._reading = True

    def record(self, index: int, tokens: Tensor) -> Call:
        """Record the arguments of block `index` for `tokens` (B, T) int64.

        Earlier blocks pass the hidden state through, so it is the embedding; `Call.with_hidden` sets another one.
        """
        return self._record(index, tokens)[index]

    def record_all(self, tokens: Tensor) -> list[Call]:
        """Record the arguments of every block for `tokens` (B, T) int64; all have the embedding as hidden state."""
        calls = self._record(len(self.blocks) - 1, tokens)
        return [calls[index] for index in range(len(self.blocks))]

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The logits (B, T, V) for `tokens` (B, T) int64, if the output of the last block is `hidden` (B, T, D).

        They are differentiable in `hidden` if torch's grad mode is on.
        """
        if self._returned is None:
            self._probe()
        with self._recorders(last_output=hidden), computing_on(self.device):
            logits: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return logits

    def hidden_bytes(self, length: int) -> int:
        """Bytes of the hidden states of one sequence of `length` tokens."""
        return self.record(0, torch.zeros(1, length, dtype=torch.int64)).hidden.nbytes

    @functools.cached_property
    def head_path(self) -> str | None:
        """The path of the layer that makes logits; None if it is not a plain linear layer, or is inside a block."""
        find: Callable[[], nn.Module | None] = self.model.get_output_embeddings  # type: ignore[assignment]
        head = find()
        path = next((name for name, module in self.model.named_modules() if module is head), None)
        inside = path is not None and any(path.startswith(f"{block.path}.") for block in self.blocks)
        return path if head is not None and is_plain_linear(head) and not inside else None

    def head_weight(self) -> Tensor:
        """(V, D) float32, the weight of the layer at `head_path`."""
        assert self.head_path is not None, "the model has no such head"
        return self.weights.original(f"{self.head_path}.weight").to(self.device, torch.float32)

    @torch.no_grad()
    def head_input(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The input of the head (B, T, D) for `tokens`, if the output of the last block is `hidden` (B, T, D)."""
        assert self.head_path is not None, "the model has no such head"
        inputs: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            raise _Reached

        handle = self.model.get_submodule(self.head_path).register_forward_pre_hook(stop, prepend=True)
        try:
            self.logits(tokens, hidden)
        except _Reached:
            return inputs[0]
        finally:
            handle.remove()
        raise UnsupportedModelError(f"{type(self.model).__name__} did not run its head {self.head_path}")

    def _record(self, index: int, tokens: Tensor) -> dict[int, Call]:
        if self._returned is None:
            self._probe()
        with self._recorders() as calls, torch.no_grad():
            self._forward(tokens, stop_after=index)
        return calls

    def _forward(self, tokens: Tensor, stop_after: int) -> None:
        self._stop_after = stop_after
        try:
            with computing_on(self.device):
                self.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Reached:
            return
        raise UnsupportedModelError(f"{type(self.model).__name__} did not run its block {stop_after}")

    @contextmanager
    def _recorders(self, last_output: Tensor | None = None, besides: object = None) -> Iterator[dict[int, Call]]:
        """While open, blocks pass their hidden state through and record their arguments.

        With `last_output`, this is the output of the last block, and no block ends the forward. What blocks return
        besides the hidden state is `besides`.
        """
        calls: dict[int, Call] = {}

        def recorder(index: int) -> Callable[..., Any]:
            def passthrough(*args: Any, **kwargs: Any) -> Any:
                calls[index] = Call(args, kwargs, self.blocks[index].layout)
                if last_output is None and index == self._stop_after:
                    raise _Reached
                hidden = calls[index].raw
                if last_output is not None and index == len(self.blocks) - 1:
                    hidden = calls[index].layout.raw(last_output)
                return (hidden, *[besides] * (self._returned - 1)) if self._returned else hidden

            return passthrough

        for index, block in enumerate(self.blocks):
            block.module.forward = recorder(index)
        try:
            yield calls
        finally:
            for block in self.blocks:
                del block.module.forward  # makes the forward of the class visible again

    def _probe(self) -> None:
        """Find out what blocks return: the hidden state alone (0), or a tuple that starts with it (its length).

        Raises UnsupportedModelError for a model whose blocks cannot be run one by one.
        """
        one_by_one.require_own_keys(self.model)
        one_by_one.require_single_runs(self.model, self._repeated)
        last = len(self.blocks) - 1
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        failure: Exception | None = None
        for self._returned in range(MOST_RETURNED + 1):
            with self._recorders() as calls, torch.no_grad():
                try:
                    self._forward(tokens, stop_after=last)
                except (LookupError, TypeError, RuntimeError, ValueError, AttributeError) as error:
                    failure = failure or error
                    continue
            if len(calls) == len(self.blocks) and all(calls[i].raw is calls[0].raw for i in calls):
                layout = Layout.of(calls[0].raw, tokens.shape[1])
                if layout is not None:
                    for block in self.blocks:
                        block.layout = layout
                    return self._require_nothing_handed_on(tokens)
                shape = tuple(calls[0].raw.shape)
                failure = UnsupportedModelError(f"its hidden state for {tokens.shape[1]} tokens has the shape {shape}")
                break
            failure = UnsupportedModelError("the hidden state changes between blocks")
        self._returned = None
        raise UnsupportedModelError(
            f"{type(self.model).__name__} cannot be replayed block by block: {failure}",
            hint="please report the architecture; rtn needs no replay",
        ) from failure

    def _require_nothing_handed_on(self, tokens: Tensor) -> None:
        """Raise UnsupportedModelError if a block gets what another returned besides the hidden state, if not None."""
        if not self._return_more:
            return
        besides = object()
        with self._recorders(besides=besides) as calls, torch.no_grad():
            try:
                self._forward(tokens, stop_after=len(self.blocks) - 1)
            except (LookupError, TypeError, RuntimeError, ValueError, AttributeError):
                return  # the model looks at these values, which are usually None
        if (names := one_by_one.handed_on(calls.values(), besides)) is not None:
            self._returned = None
            raise one_by_one.refused(self.model, f"a block gets {names} from the one before it")

    def _filler(self, path: str) -> Callable[[nn.Module, Any], None]:
        """A hook that reads the direct parameters of a module when it is first run."""

        def fill_now(module: nn.Module, _: Any) -> None:
            if self._reading and any(p is not None and p.is_meta for p in module._parameters.values()):
                self.weights.fill(path, module, self.device)

        return fill_now


def largest_module_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the module list with the most parameters of those that run on text."""
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks",
            hint="use a model with a list of decoder blocks",
        )
    lists.sort(key=lambda item: sum(p.numel() for p in item[1].parameters()))
    largest, _ = lists[-1]
    if all(name.startswith(largest) for name, _ in lists):
        return lists[-1]
    ran = meta_run.modules_run(model)  # an image encoder may be larger than the decoder
    return next((item for item in reversed(lists) if all(id(module) in ran for module in item[1])), lists[-1])
