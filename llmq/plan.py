"""Everything about a run that is known before it reads a text or a weight: headers and configuration only.

A `Plan` raises for whatever can be known to go wrong before hours are spent.  With other settings it is made again from
the same model, which is how `--target-bits` carries out what it has measured.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmq import formats, schemes
from llmq.algorithms import Options
from llmq.checkpoint import hub
from llmq.checkpoint.reader import Checkpoint
from llmq.config import QuantConfig, Scheme, matches
from llmq.errors import UnsupportedModelError
from llmq.formats import Layout
from llmq.methods import Method
from llmq.model.skeleton import Skeleton
from llmq.report.record import OUTSIDE_THE_BLOCKS
from llmq.runtime.load import choose_device, quantization_settings, stored_dtype
from llmq.runtime.unpacked import open_skeleton
from llmq.schemes import LayerPlan


@dataclass(frozen=True)
class Plan:
    """What is asked for, of which model, and what is to become of each linear layer of its blocks.

    layers      by the layer's path in the model
    stages      those of `settings.method`, or what takes their place in an experiment
    model_dtype the dtype that the checkpoint is stored in
    """

    settings: QuantConfig
    stages: Method
    checkpoint: Checkpoint
    device: torch.device
    layout: Layout
    model_dtype: torch.dtype
    skeleton: Skeleton
    layers: Mapping[str, LayerPlan]

    @classmethod
    def make(
        cls,
        model: str | Path,
        settings: QuantConfig,
        stages: Method | None,
        *,
        device: str,
        revision: str | None,
        remote_code: bool,
    ) -> "Plan":
        """Raises CheckpointError, UnsupportedModelError, ConfigError and BackendError."""
        checkpoint = Checkpoint.open(hub.locate(str(model), revision, remote_code=remote_code))
        _refuse_quantized(checkpoint)
        chosen, method = choose_device(device), stages or settings.stages
        layout = formats.load(settings.format)
        dtype = stored_dtype(checkpoint)
        exact = chosen.type == "cpu" or method.transforms  # foldings are found in float32
        skeleton = open_skeleton(checkpoint, chosen, torch.float32 if exact else dtype, remote_code=remote_code)
        layers = _plan_layers(skeleton, settings, layout)
        return cls(settings, method, checkpoint, chosen, layout, dtype, skeleton, layers)

    def with_settings(self, settings: QuantConfig) -> "Plan":
        """The same model under other settings; method, format and device are as they were."""
        layers = _plan_layers(self.skeleton, settings, self.layout)
        return dataclasses.replace(self, settings=settings, layers=layers)

    @property
    def options(self) -> Options:
        settings = self.settings
        dtype = self.layout.scale_dtype(self.model_dtype)
        return Options(dtype, settings.order, settings.scales, settings.damping)

    @property
    def expected_bytes(self) -> int:
        """About what the finished weights will take."""
        itemsize = self.layout.scale_dtype(self.model_dtype).itemsize
        packed = [plan for plan in self.layers.values() if plan.scheme is not None]
        before = sum(self.checkpoint.info(f"{plan.name}.weight").nbytes for plan in packed)
        return self.checkpoint.nbytes - before + sum(plan.packed_bytes(itemsize) for plan in packed)

    def left(self) -> dict[str, str]:
        """Every weight of two dimensions or more that stays as it is, with the reason."""
        left = {plan.name: plan.reason for plan in self.layers.values() if plan.scheme is None}
        inside = tuple(f"{block.path}." for block in self.skeleton.blocks)
        weights = self.skeleton.weights
        for name, parameter in self.skeleton.model.named_parameters():
            path = name.removesuffix(".weight")
            if parameter.dim() < 2 or path in self.layers or weights.is_tied(name):
                continue
            left[weights.module_name(path)] = "not a linear layer" if name.startswith(inside) else OUTSIDE_THE_BLOCKS
        return left

    def idle_patterns(self) -> list[str]:
        """What a user should know of --skip and --override patterns that no layer fits."""
        patterns = [*self.settings.skip, *(override.pattern for override in self.settings.overrides)]
        names = [plan.name for plan in self.layers.values()]
        idle = [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
        return [f"no layer of the blocks matches the pattern {pattern!r}" for pattern in idle]

    def outside(self) -> list[str]:
        """The tensors that are copied as they are: embeddings, norms and heads outside of the blocks."""
        inside = {name for block in self.skeleton.blocks for name in block.stored_names()}
        return [name for name in self.checkpoint.names() if name not in inside]

    def quantization_config(self, quantized: set[str] | None = None) -> dict[str, Any]:
        """The block for config.json where the linear layers `quantized`, by default all planned, are packed."""
        chosen: dict[str, Scheme] = {}
        unquantized: list[str] = []
        for path, module in self.skeleton.model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            names = dict.fromkeys((path, self.skeleton.weights.module_name(path)))  # readers look for either
            plan = self.layers.get(path)
            if plan is not None and plan.scheme is not None and (quantized is None or plan.name in quantized):
                chosen |= dict.fromkeys(names, plan.scheme)
            else:
                unquantized += names
        return self.layout.quantization_config(chosen, unquantized)


def _plan_layers(skeleton: Skeleton, settings: QuantConfig, layout: Layout) -> dict[str, LayerPlan]:
    linears = {path: module for block in skeleton.blocks for path, module in block.linears.items()}
    name = skeleton.weights.module_name
    shapes = [(name(path), module.out_features, module.in_features) for path, module in linears.items()]
    return dict(zip(linears, schemes.plan_layers(shapes, settings, layout), strict=True))


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    settings = quantization_settings(checkpoint)
    if settings is not None:
        method = settings.get("quant_method", "its config.json has a quantization_config")
        raise UnsupportedModelError(
            f"{checkpoint.folder} is already quantized ({method})",
            hint="start from the unquantized model; its name is often in this one's README.md, under base_model",
        )
