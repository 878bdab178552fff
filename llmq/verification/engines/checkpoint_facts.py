"""The facts that serving engines check: layers and settings of a model, from headers only, finished or planned."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq import formats
from llmq.checkpoint.index import INDEX, SINGLE, is_onnx, read_json_object
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError
from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings

GROUP_INDEX = ("g_idx", "weight_g_idx")
TOKENIZER = "tokenizer_config.json"
ONNX = "onnx"


@dataclass(frozen=True)
class Linear:
    """A linear layer under its name on disk; `scheme` is None if it is float.

    affine    whether the packed weight is on a grid of integers
    ordered   whether the columns are grouped by act-order
    declared  whether config.json declares the layer as packed
    inputs    how its inputs are quantized, if the format declares it
    """

    name: str
    out_features: int
    in_features: int
    scheme: WeightScheme | None
    affine: bool = True
    ordered: bool = False
    declared: bool = False
    inputs: InputScheme | None = None

    @property
    def packed(self) -> bool:
        return self.scheme is not None or not self.affine

    @property
    def weights_alone(self) -> bool:
        """Whether weights are integers and inputs are float, which is what Marlin and other packed kernels compute."""
        return self.scheme is not None and self.scheme.floats is None and self.inputs is None

    @property
    def last(self) -> str:
        """`q_proj`"""
        return self.name.rpartition(".")[2]

    def group(self) -> int:
        """Columns that share a scale."""
        return self.in_features if self.scheme is None else self.scheme.columns_per_group(self.in_features)


@dataclass(frozen=True)
class Subject:
    """A model.

    method     `quant_method` as spelled in config.json; "gguf" for a .gguf file, "onnx" for an ONNX graph; None if
               nothing is packed
    settings   the quantization_config
    linears    every linear layer that has its own weight on disk
    tokenizer  tokenizer_config.json
    strays     files that do not belong to the model, but that an engine may load as weights
    """

    method: str | None
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    linears: tuple[Linear, ...]
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    strays: tuple[str, ...] = ()

    @property
    def packed(self) -> list[Linear]:
        return [linear for linear in self.linears if linear.packed]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json about the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config


def read(model: Path) -> Subject:
    """Read the facts about the model in a folder, or a .gguf file. Raises CheckpointError and FormatError."""
    alone = model.suffix == ".gguf" and not model.is_dir()
    folder = model.parent if alone else model
    if not alone and is_onnx(folder):
        return Subject(ONNX, read_json_object(folder / "config.json"), {}, (), tokenizer(folder))
    if alone or (list(folder.glob("*.gguf")) and not list(folder.glob("*.safetensors"))):
        config = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
        return Subject("gguf", config, {}, (), tokenizer(folder))
    checkpoint = Checkpoint.open(folder)
    settings = quantization_settings(checkpoint)
    linears = floats(checkpoint)
    if settings is not None:
        linears = [*_packed(checkpoint, PackedWeights(checkpoint)), *declared(linears, settings)]
    method = None if settings is None else str(settings.get("quant_method", ""))
    return Subject(method, checkpoint.config, settings or {}, tuple(linears), tokenizer(folder), _strays(folder))


def _packed(checkpoint: Checkpoint, packed: PackedWeights) -> list[Linear]:
    linears = []
    for module in packed.modules:
        affine = packed.is_affine(module)
        scheme = packed.scheme(module) if affine or packed.scheme(module).floats else None
        N, K = packed.shape(module)
        linears.append(
            Linear(
                module,
                N,
                K,
                scheme,
                affine,
                scheme is not None and _ordered(checkpoint, module, scheme, K),
                inputs=packed.declared_inputs(module),
            )  # fmt: skip
        )
    return linears


def _ordered(checkpoint: Checkpoint, module: str, scheme: WeightScheme, in_features: int) -> bool:
    """Whether the file holds a group index that differs from k // group size."""
    for suffix in GROUP_INDEX:
        if f"{module}.{suffix}" in checkpoint:
            index = checkpoint.tensor(f"{module}.{suffix}")
            columns = index.new_tensor(range(len(index))) // scheme.columns_per_group(in_features)
            return bool((index >= 0).all()) and bool(index.any()) and not bool((index == columns).all())
    return False


def floats(checkpoint: Checkpoint) -> list[Linear]:
    """The matrices that are not packed, including embeddings."""
    linears = []
    for module in checkpoint.modules_with("weight"):
        info = checkpoint.info(f"{module}.weight")
        if len(info.shape) == 2 and info.is_float:
            linears.append(Linear(module, *info.shape, None))
    return linears


def declared(linears: Sequence[Linear], settings: Mapping[str, Any]) -> list[Linear]:
    """Float layers, marked if config.json declares them as packed."""
    reader = formats.detect(settings).read_config(settings)
    return [dataclasses.replace(linear, declared=reader(linear.name) is not None) for linear in linears]


def tokenizer(folder: Path) -> Mapping[str, Any]:
    """Read tokenizer_config.json; empty if there is none."""
    return read_json_object(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else {}


def _strays(folder: Path) -> tuple[str, ...]:
    """Shards and an index that do not belong to the model."""
    present = {entry.name for entry in folder.glob("*.safetensors")}
    index = folder / INDEX
    if SINGLE in present:
        return tuple(sorted((present - {SINGLE}) | ({INDEX} if index.is_file() else set())))
    if not index.is_file():
        return ()
    try:
        named = set(read_json_object(index).get("weight_map", {}).values())
    except CheckpointError:
        return (INDEX,)
    return tuple(sorted(present - named))
