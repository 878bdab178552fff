"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) in the files of PEFT: what they add to the weights of a model.

    W  ──►  W + s B A        A (r, K), B (N, r),    s = alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA

Only adapters that are exactly this are read. Others (DoRA, replaced layers, trained biases, initial values that changed
the base model) are refused by name, because a merge without these parts would be another model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.index import ADAPTER, ADAPTER_WEIGHTS, read_json_object
from llmq.checkpoint.safetensors_files import read_header, read_tensor
from llmq.errors import CheckpointError, UnsupportedModelError

PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
MERGE_WITH_PEFT = "merge it with merge_and_unload() of PEFT into the float model, and quantize the merged model"
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change the base model


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: the factor s and the shape (N, K) of each layer, by the path of the layer."""

    folder: Path
    scalings: Mapping[str, float]
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def open(cls, folder: Path) -> "Adapter":
        """Open a folder of PEFT. Raises CheckpointError for damaged files, UnsupportedModelError for other adapters."""
        if not (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder} has no {ADAPTER}", hint="give the folder that PEFT saved the adapter in")
        config = read_json_object(folder / ADAPTER)
        _refuse_others(config)
        file = folder / f"{ADAPTER_WEIGHTS}.safetensors"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no {file.name}",
                hint="save the adapter again with safetensors, which is the default of PEFT",
            )
        shapes = {name: info.shape for name, info in read_header(file).items()}
        paths = [name.removeprefix(PREFIX).removesuffix(DOWN) for name in shapes if name.endswith(DOWN)]
        known = {f"{PREFIX}{path}{suffix}" for path in paths for suffix in (DOWN, UP)}
        if not paths or shapes.keys() != known:
            odd = min(shapes.keys() ^ known, default="no tensor")
            raise UnsupportedModelError(
                f"{file.name}: {odd} does not belong to a pair of lora_A and lora_B of a linear layer",
                hint=MERGE_WITH_PEFT,
            )
        scalings = {path: _scaling(path, config, shapes) for path in paths}
        changed = {path: (shapes[f"{PREFIX}{path}{UP}"][0], shapes[f"{PREFIX}{path}{DOWN}"][1]) for path in paths}
        return cls(folder, scalings, changed)

    def change(self, path: str) -> Tensor:
        """s B A of a layer, (N, K) float32. Raises CheckpointError if it is not finite."""
        file = self.folder / f"{ADAPTER_WEIGHTS}.safetensors"
        header = read_header(file)
        down, up = (read_tensor(file, header[f"{PREFIX}{path}{suffix}"]).to(torch.float32) for suffix in (DOWN, UP))
        change = (up @ down) * self.scalings[path]
        if not bool(change.isfinite().all()):
            raise CheckpointError(f"the adapter adds NaN or infinity to {path}", hint="its training has diverged")
        return change


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for anything that is not plain LoRA on linear layers."""
    initial = config.get("init_lora_weights", True)
    others = {
        f"of the type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "with DoRA": config.get("use_dora"),
        "with trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "that replaces layers (modules_to_save)": config.get("modules_to_save"),
        "with trained tokens": config.get("trainable_token_indices"),
        "on transposed layers (fan_in_fan_out)": config.get("fan_in_fan_out"),
        "with repeated layers": config.get("layer_replication"),
        "on parameters (target_parameters)": config.get("target_parameters"),
        "with activated tokens (aLoRA)": config.get("alora_invocation_tokens"),
        "of QA-LoRA": config.get("use_qalora"),
        f"whose start ({initial}) changed the base model": isinstance(initial, str)
        and initial.lower().startswith(CHANGED_BASE),
    }
    for kind, applies in others.items():
        if applies:
            raise UnsupportedModelError(f"the adapter is one {kind}, expected plain LoRA", hint=MERGE_WITH_PEFT)


def _scaling(path: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> float:
    """The factor s of a layer."""
    down, up = (shapes[f"{PREFIX}{path}{suffix}"] for suffix in (DOWN, UP))
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] < 1:
        raise CheckpointError(f"{path} has lora_A {down} and lora_B {up}, expected (r, K) and (N, r)")
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if set(pattern) & set("^$*+?()[]{}|\\"):
            raise UnsupportedModelError(f"alpha_pattern holds the pattern {pattern!r}", hint=MERGE_WITH_PEFT)
        if path == pattern or path.endswith(f".{pattern}"):
            alpha = value
            break
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"lora_alpha is {alpha!r} in {ADAPTER}, expected a number")
    return alpha / (math.sqrt(down[0]) if config.get("use_rslora") else down[0])
