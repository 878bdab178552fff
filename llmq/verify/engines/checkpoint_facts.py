"""What serving engines look at: a model's layers and settings, from headers alone, finished or only planned."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq import formats
from llmq.checkpoint.index import INDEX, SINGLE, read_json_object
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError
from llmq.numerics.scheme import WeightScheme
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings

GROUP_INDEX = ("g_idx", "weight_g_idx")
TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True)
class Linear:
    """A linear layer under its name on the disk; `scheme` is None where it is float.

    affine    whether the packed weight is codes on an integer grid
    ordered   whether the columns are grouped in an order of their own
    declared  whether config.json says that it is packed
    """

    name: str
    out_features: int
    in_features: int
    scheme: WeightScheme | None
    affine: bool = True
    ordered: bool = False
    declared: bool = False

    @property
    def packed(self) -> bool:
        return self.scheme is not None or not self.affine

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

    method     `quant_method` as config.json spells it; "gguf" for a file of llama.cpp's; None where nothing is packed
    settings   the block quantization_config
    linears    every linear layer that has a weight of its own on the disk
    tokenizer  tokenizer_config.json
    strays     files that an engine may take for weights of the model, and that are none
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
        """The language model's part of config.json."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config


def read(model: Path) -> Subject:
    """The model in a folder, or a .gguf file.  Raises CheckpointError and FormatError for what cannot be understood."""
    alone = model.suffix == ".gguf" and not model.is_dir()
    folder = model.parent if alone else model
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
    found = []
    for module in packed.modules:
        affine = packed.is_affine(module)
        scheme = packed.scheme(module) if affine else None
        N, K = packed.shape(module)
        found.append(
            Linear(module, N, K, scheme, affine, scheme is not None and _ordered(checkpoint, module, scheme, K))
        )
    return found


def _ordered(checkpoint: Checkpoint, module: str, scheme: WeightScheme, in_features: int) -> bool:
    """Whether the file holds a group index that says more than k // group size."""
    for suffix in GROUP_INDEX:
        if f"{module}.{suffix}" in checkpoint:
            index = checkpoint.tensor(f"{module}.{suffix}")
            columns = index.new_tensor(range(len(index))) // scheme.columns_per_group(in_features)
            return bool((index >= 0).all()) and bool(index.any()) and not bool((index == columns).all())
    return False


def floats(checkpoint: Checkpoint) -> list[Linear]:
    """The matrices that are not packed, embeddings among them."""
    found = []
    for module in checkpoint.modules_with("weight"):
        info = checkpoint.info(f"{module}.weight")
        if len(info.shape) == 2 and info.dtype.is_floating_point:
            found.append(Linear(module, *info.shape, None))
    return found


def declared(linears: Sequence[Linear], settings: Mapping[str, Any]) -> list[Linear]:
    """Float layers with what config.json says of them."""
    reader = formats.detect(settings).read_config(settings)
    return [dataclasses.replace(each, declared=reader(each.name) is not None) for each in linears]


def tokenizer(folder: Path) -> Mapping[str, Any]:
    """tokenizer_config.json, empty where there is none."""
    return read_json_object(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else {}


def _strays(folder: Path) -> tuple[str, ...]:
    """Shards and an index that belong to no model here."""
    there = {entry.name for entry in folder.glob("*.safetensors")}
    index = folder / INDEX
    if SINGLE in there:
        return tuple(sorted((there - {SINGLE}) | ({INDEX} if index.is_file() else set())))
    if not index.is_file():
        return ()
    try:
        named = set(read_json_object(index).get("weight_map", {}).values())
    except CheckpointError:
        return (INDEX,)
    return tuple(sorted(there - named))
