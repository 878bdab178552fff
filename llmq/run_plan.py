"""Everything about a run that is known from headers and configuration, before any text or weight is read.

Creating a `Plan` raises for every problem that can be detected before the long computation. `Plan.with_settings` makes
the plan again for other settings of the same model: `--target-bits` uses it to apply what it has measured.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmq.algorithms import Options
from llmq.checkpoint import hub
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.side_files import companions
from llmq.config import QuantConfig
from llmq.cost.files import packed_layers
from llmq.errors import UnsupportedModelError
from llmq.formats import foreign
from llmq.formats.base import Layout
from llmq.gguf import imatrix, recipes
from llmq.gguf.imatrix import Importance
from llmq.methods import Method
from llmq.mixed_precision import preset
from llmq.model.build import ties
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.gguf_types import GGUF_GRIDS
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme
from llmq.patterns import matches
from llmq.runtime.checkpoint_weights import quantization_settings
from llmq.runtime.load import choose_device, stored_dtype
from llmq.runtime.open_skeleton import open_model, stored_bytes
from llmq.steps import existing_grids, layer_plans, left_in_float, output_layout, separate_grids
from llmq.steps.existing_grids import Sighting
from llmq.steps.linear_names import holds_matrix

FIXED_SCALES = "no scales are tuned: kernels for 4-bit weights with fp8 inputs would round tuned scales again"


@dataclass(frozen=True)
class Plan:
    """The settings of a run, the model, and the scheme of each linear layer of its blocks.

    layers       by the layer's path in the model
    remote_code  whether code that comes with the model may run
    stages       the stages of `settings.method`, or those that replace them in an experiment
    model_dtype  the dtype in which the checkpoint is stored
    notes        for the user: what a preset has added to the settings, and how the tensors differ from config.json
    unused       tensors of the checkpoint that belong to no module of the model
    importance   how much each input of each layer counts, from an importance matrix; None without one
    """

    settings: QuantConfig
    stages: Method
    checkpoint: Checkpoint
    device: torch.device
    layout: Layout
    model_dtype: torch.dtype
    skeleton: Skeleton
    layers: Mapping[str, LayerPlan]
    remote_code: bool = False
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    importance: Importance | None = None

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
        separate_grids.require_one(settings, "this run")
        output_layout.require_head(settings)
        output_layout.require_inputs(settings)
        output_layout.require_writable(settings.formats, checkpoint, checkpoint.names())
        chosen, method = choose_device(device), stages or settings.stages
        settings, matrix = imatrix.split(settings, method)
        dtype = stored_dtype(checkpoint)
        layout = output_layout.layout_of(settings.formats, dtype)
        exact = chosen.type == "cpu" or method.transforms  # folding sites are detected in float32
        computed = torch.float32 if exact else dtype
        opened = open_model(checkpoint, computed, remote_code=remote_code, pin=chosen.type == "cuda")
        skeleton, checkpoint = Skeleton(opened.model, opened.weights, chosen), opened.checkpoint
        settings, notes = preset.applied(settings, skeleton, layout)
        layers = planned_layers(skeleton, settings, layout, checkpoint.config)
        notes = (*notes, *input_notes(layers.values()), *opened.notes, *companions(checkpoint.folder).notes)
        plan = cls(
            settings, method, checkpoint, chosen, layout, dtype, skeleton, layers, remote_code, notes, opened.left
        )._without_useless_tuning()
        return plan if matrix is None else plan._weighted(matrix)

    def _without_useless_tuning(self) -> "Plan":
        """The plan without tuning of scales if there is a layer whose tuned scales a kernel would round again."""
        fixed = self.stages.with_fixed_scales()
        if fixed == self.stages or not any(plan.scheme.scales_are_products for plan in self.layers.values()):
            return self
        return dataclasses.replace(self, stages=fixed, notes=(*self.notes, FIXED_SCALES))

    def _weighted(self, matrix: Path) -> "Plan":
        """The plan with the importance matrix in the file `matrix`."""
        packed = [(plan.name, plan.in_features) for plan in self.layers.values() if plan.scheme.weights is not None]
        outside = [(name, self.checkpoint.info(f"{name}.weight").shape[1]) for name in sorted(self._packed_outside())]
        importance = imatrix.read(matrix, self.checkpoint.config, packed, outside)
        return dataclasses.replace(self, notes=(*self.notes, *importance.notes), importance=importance)

    def with_settings(self, settings: QuantConfig) -> "Plan":
        """The plan of the same model for other settings with the same method, format and device."""
        layers = planned_layers(self.skeleton, settings, self.layout, self.checkpoint.config)
        return dataclasses.replace(self, settings=settings, layers=layers)._without_useless_tuning()

    @property
    def options(self) -> Options:
        settings = self.settings
        values = output_layout.scale_values(self.layout, self.model_dtype)
        return Options(values, settings.order, settings.scales, settings.damping)

    @property
    def expected_bytes(self) -> int:
        """Approximate size of the finished weights in bytes."""
        packed = [plan for plan in self.layers.values() if plan.scheme.weights is not None]
        packed += self._packed_outside().values()
        before = sum(self.float_bytes(plan.name) for plan in packed)
        return self.checkpoint.nbytes - before + packed_layers(packed, self.layout, self.model_dtype)

    def float_bytes(self, name: str) -> int:
        """Bytes of a layer's float weight, by its name in the checkpoint; 0 for a tied head."""
        if name == self.tied_head:
            return 0
        return stored_bytes(self.skeleton, self.checkpoint, f"{name}.weight")

    @property
    def tied_head(self) -> str | None:
        """The path of the head if it will be quantized and is tied to the embedding now; else None."""
        path = self.skeleton.head_path
        weights = self.skeleton.weights
        return path if path in self.layers and path is not None and weights.is_tied(f"{path}.weight") else None

    def config_json(self, quantized: set[str]) -> dict[str, Any]:
        """The model's config.json; if a tied head was quantized, `tie_word_embeddings` becomes false."""
        config = self.checkpoint.config
        return ties.untied_config(config) if self.tied_head in quantized else dict(config)

    @functools.cached_property
    def existing_grids(self) -> Mapping[str, Sighting]:
        """The linear layers whose weights already lie on a grid, by path, from a few rows of each."""
        if not self.settings.keep_grid:
            return {}
        return existing_grids.look(self.skeleton, self.checkpoint, self.layers, self.options.scale_dtype)

    @functools.cached_property
    def grid_notes(self) -> list[str]:
        """What happens with weights that already lie on a grid, and which settings would store them without error."""
        places = existing_grids.Places(self.settings, self.layout, self.model_dtype, self.checkpoint)
        return existing_grids.notes(self.existing_grids, self.layers, places)

    def left(self) -> dict[str, str]:
        """Every weight with two or more dimensions that is kept in float, and the reason."""
        return left_in_float.reasons(self.skeleton, self.checkpoint, self.layers, self._packed_outside(), self.unused)

    def _packed_outside(self) -> dict[str, LayerPlan]:
        """Modules outside the blocks that a GGUF recipe packs when the file is written: embedding and head."""
        if self.settings.format not in GGUF_GRIDS:
            return {}
        shapes = {name: self.checkpoint.info(name).shape for name in self.outside()}
        grids = recipes.outside(shapes, self.settings, self.checkpoint.config)
        plans = {}
        for name, grid in grids.items():
            (rows, columns), module = shapes[name], name.removesuffix(".weight")
            plans[module] = LayerPlan(module, rows, columns, Scheme(grid))
        return plans

    def idle_patterns(self) -> list[str]:
        """A note for each --skip or --override pattern that matches no layer."""
        patterns = [*self.settings.skip, *(override.pattern for override in self.settings.overrides)]
        names = [plan.name for plan in self.layers.values()]
        idle = [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
        return [f"no layer of the blocks matches the pattern {pattern!r}" for pattern in idle]

    def outside(self) -> list[str]:
        """The names of the tensors that are copied unchanged.

        These are embeddings, norms and heads outside the blocks, and stacked experts that are not packed.
        """
        weights, packed = (
            self.skeleton.weights,
            {plan.name for plan in self.layers.values() if plan.scheme.weights is not None},
        )
        inside = {name for block in self.skeleton.blocks for name in block.stored_names()}
        inside |= {stacked for name, stacked in weights.stacked_in.items() if not weights.left_stacked(name, packed)}
        head = f"{self.skeleton.head_path}"
        if head in self.layers:
            inside |= {f"{name}.weight" for name in packed if name == self.layers[head].name}
        return [name for name in self.checkpoint.names() if name not in inside]

    def quantization_config(self, quantized: set[str] | None = None, layout: Layout | None = None) -> dict[str, Any]:
        """The `quantization_config` of config.json, if the linear layers `quantized` are packed (default: all planned).

        `layout` is given if it is not the layout in which the blocks are staged.
        """
        chosen: dict[str, Scheme] = {}
        floats = left_in_float.unused_modules(self.skeleton, self.checkpoint)
        for path, module in self.skeleton.model.named_modules():
            if not holds_matrix(module):
                continue
            names = dict.fromkeys((path, self.skeleton.weights.module_name(path)))  # readers look for one or the other
            plan = self.layers.get(path)
            if plan is not None and plan.scheme.weights is not None and (quantized is None or plan.name in quantized):
                chosen |= dict.fromkeys(names, plan.scheme)
            else:
                floats += names
        return (layout or self.layout).declare(chosen, floats)


def planned_layers(
    skeleton: Skeleton, settings: QuantConfig, layout: Layout, config: Mapping[str, Any]
) -> dict[str, LayerPlan]:
    """As `plan_layers`; from now on, every pass of the model rounds inputs as planned, static ones when measured."""
    layers = plan_layers(skeleton, settings, layout, config)
    schemes = {path: plan.scheme.inputs for path, plan in layers.items()}
    skeleton.quantize_inputs({path: inputs for path, inputs in schemes.items() if inputs is not None})
    return layers


def input_notes(layers: Iterable[LayerPlan]) -> list[str]:
    """How many layers have quantized inputs, and which packed layers keep float inputs."""
    packed = [plan for plan in layers if plan.scheme.weights is not None]
    kinds = Counter(str(plan.scheme.inputs) for plan in packed if plan.scheme.inputs is not None)
    if not kinds:
        return []
    floats = [plan.name for plan in packed if plan.scheme.inputs is None]
    kept = f"; those of {len(floats)} quantized layers are kept in float, such as {floats[0]}" if floats else ""
    listed = " and ".join(f"of {number} layers to {kind}" for kind, number in kinds.items())
    return [f"inputs are quantized, {listed}{kept}"]


def plan_layers(
    skeleton: Skeleton, settings: QuantConfig, layout: Layout, config: Mapping[str, Any]
) -> dict[str, LayerPlan]:
    """The plan of each linear layer by its path; `config` is that of config.json. Raises ConfigError."""
    linears = {path: module for block in skeleton.blocks for path, module in block.linears.items()}
    if settings.quantize_head:
        linears |= _head(skeleton)
    name = skeleton.weights.module_name
    shapes = [(name(path), module.out_features, module.in_features) for path, module in linears.items()]
    if settings.format in GGUF_GRIDS:
        return dict(zip(linears, recipes.plan_layers(shapes, settings, config), strict=True))
    plans = dict(zip(linears, layer_plans.plan_layers(shapes, settings, layout), strict=True))
    if settings.quantize_head:  # its inputs are float: they are those of the last step, and engines expect it
        plans |= {path: plans[path].with_float_inputs() for path in _head(skeleton)}
    return layer_plans.alike(plans, skeleton.alike(), settings, layout)


def _head(skeleton: Skeleton) -> dict[str, nn.Linear]:
    path = skeleton.head_path
    module = None if path is None else skeleton.model.get_submodule(path)
    if path is None or not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__} has no head that could be quantized",
            hint="leave --quantize-head out: the layer that makes its logits is not a plain linear layer",
        )
    return {path: module}


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    settings = quantization_settings(checkpoint)
    if settings is not None:
        other = foreign.of_block(settings)
        method = settings.get("quant_method", "its config.json has a quantization_config")
        raise UnsupportedModelError(
            f"{checkpoint.folder} is already quantized ({other.name if other else method})",
            hint=(other.way_out if other else foreign.ORIGINAL)
            + "; the README.md of the quantized model often names it as base_model",
        )
