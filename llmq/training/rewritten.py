"""Write a trained model: the files of the quantized model that it started from, with other values.

    every trained weight ──► packed like the weight in the start ──► read back, compared float for float
    norms                ──► in the dtype of the start
    all other tensors, config.json, tokenizer, licence ──► copied byte for byte

So whatever loads the start also loads the result, in every format that llmq writes.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.shards import write_shards
from llmq.checkpoint.side_files import CONFIGURATIONS, companions
from llmq.checkpoint.writer import Writer, put_companions
from llmq.errors import ConfigError, FormatError
from llmq.export import card
from llmq.formats import tensor_name
from llmq.report import pages
from llmq.report.stored_record import known_report, read_record
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq.training.fake_quantized import FakeQuantizedLinear
from llmq.training.prepare import Origin, origin_of
from llmq.verification.integrity import checksums


def commit(writer: Writer, model: nn.Module) -> float:
    """Write the trained tensors of a prepared model into the staging folder of `writer`, as one block.

    Returns the fraction of the quantized values that differ from the start.
    """
    origin = origin_of(model)
    _refuse_others(model, origin)
    checkpoint = Checkpoint.open(origin.folder)
    packed = PackedWeights(checkpoint)
    tensors: dict[str, Tensor] = {}
    moved = total = 0
    for path, layer in _layers(model, origin):
        weight = layer.quantized().to(torch.device("cpu"))
        moved += int((weight.codes != layer.codes.cpu()).sum())
        total += weight.codes.numel()
        name = origin.names[path]
        tensors |= {tensor_name(name, suffix): part.contiguous() for suffix, part in packed.pack(name, weight).items()}
    for name, stored in origin.norms.items():
        norm = model.get_parameter(name).detach().cpu()
        tensors[stored] = norm.to(checkpoint.info(stored).dtype).contiguous()
    writer.commit(0, tensors, {})
    return moved / max(1, total)


def assemble(writer: Writer, final: Path, model: nn.Module) -> None:
    """Write the files of the trained model, whose tensors were committed, into the empty folder `final`.

    Raises FormatError if a weight in the files differs from that of the model in any float.
    """
    origin = origin_of(model)
    checkpoint = Checkpoint.open(origin.folder)
    packed = PackedWeights(checkpoint)
    written = {name for module in origin.names.values() for name in packed.tensor_names(module)}
    written |= set(origin.norms.values())
    locations = {name: checkpoint.location(name) for name in checkpoint.names() if name not in written}
    rest = [(location.file, name, location.info) for name, location in locations.items()]
    writer.assemble(final, rest, _companions(origin.folder), {})
    made = PackedWeights(Checkpoint.open(final))
    for path, layer in _layers(model, origin):
        if not torch.equal(made.weight(origin.names[path]), layer.quantized().dequantize().cpu()):
            raise FormatError(
                f"{origin.names[path]} in the files differs from the trained weight; no model was written",
                hint="this is a bug in llmq: please report it with the name of the model",
            )


def replace_by_start(final: Path, start: Path) -> None:
    """Replace the files of a trained model in `final` by those of its start."""
    for entry in final.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    checkpoint = Checkpoint.open(start)
    locations = {name: checkpoint.location(name) for name in checkpoint.names()}
    write_shards(final, [(location.file, name, location.info) for name, location in locations.items()])
    put_companions(final, _companions(start), {})


def record(final: Path, start: Path, changes: Mapping[str, Any], notes: list[str]) -> None:
    """Write llmq.json, the card and the report of a model in `final`: the record of the start with `changes`."""
    known = read_record(start)
    content = {**known, **changes, "notes": [*known.get("notes", ()), *notes], "checksums": checksums(final)}
    content["notes"] += card.write(final, start, content)
    write_text(final / PROVENANCE_FILE, json_text(content))
    if (run := known_report(content)) is not None:
        pages.write(final, run)


def _companions(start: Path) -> dict[str, Path]:
    """The files next to the weights, which are copied unchanged."""
    configurations = {name: start / name for name in CONFIGURATIONS if (start / name).is_file()}
    return {**companions(start).files, **configurations}


def _refuse_others(model: nn.Module, origin: Origin) -> None:
    """Raise ConfigError for a trainable parameter that the files do not get: its training would be lost."""
    written = {f"{path}.{part}" for path in origin.names for part in ("offset", "stretch")} | origin.norms.keys()
    others = [name for name, own in model.named_parameters() if own.requires_grad and name not in written]
    if others:
        raise ConfigError(
            f"{others[0]} is trainable, but only offset and stretch of quantized layers, and norms, are written",
            hint=f"to write the model without its training: model.get_parameter({others[0]!r}).requires_grad_(False)",
        )


def _layers(model: nn.Module, origin: Origin) -> list[tuple[str, FakeQuantizedLinear]]:
    layers = []
    for path in origin.names:
        layer = model.get_submodule(path)
        if not isinstance(layer, FakeQuantizedLinear):
            raise FormatError(
                f"{path} is a {type(layer).__name__}, expected a FakeQuantizedLinear",
                hint="merge or remove adapters, and convert the model that prepare_qat returned",
            )
        layers.append((path, layer))
    return layers
