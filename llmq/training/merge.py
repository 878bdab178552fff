"""`llmq merge`: a LoRA adapter merged into a model, and the merged weights quantized with calibration text.

    float or dequantized weights + adapter ──► a temporary float folder ──► quantized as by `llmq quantize`

A merged weight does not lie on the grid of its base any more, so it is rounded again. Weights of a quantized base that
the adapter does not touch are still on their grid, and keep their values exactly (`steps/existing_grids.py`). The
verdict of the run is the cost of the merge: the finished model against the merged floats, next to round to nearest.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llmq import formats
from llmq.checkpoint import hub
from llmq.checkpoint.atomic import storing, write_text
from llmq.checkpoint.in_memory import date_by_contents
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import write_tensors
from llmq.checkpoint.side_files import companions
from llmq.checkpoint.writer import CONFIG, put_companions
from llmq.config import CONVERTIBLE, Override, QuantConfig
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.job import Job
from llmq.numerics.scheme import WeightScheme
from llmq.report.events import OnEvent, ignore
from llmq.report.record import Report
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.open_skeleton import Opened, open_model
from llmq.steps.linear_names import linear_names
from llmq.training.adapter import MERGE_WITH_PEFT, Adapter

FILE_BYTES = 1 << 30  # of the tensors that are in memory and written together


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    settings: QuantConfig | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Report:
    """Merge a LoRA adapter into a quantized or float model, quantize the result into `out`, and return the report.

    settings  those of `llmq.quantize`; default: gptq, and for a quantized model its own grids and format (`like_base`)

    Raises the errors of `llmq.errors`.
    """
    folder = hub.locate(str(model), remote_code=trust_remote_code)
    opened = open_model(Checkpoint.open(folder), torch.float32, remote_code=trust_remote_code)
    lora = Adapter.open(hub.locate(str(adapter)))
    with _merged(opened, lora, Path(out)) as floats:
        job = Job(
            floats, out, settings or like_base(folder, QuantConfig(method="gptq")), device=device, overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        job.report.source = str(model)
        job.report.notes.append(
            f"the adapter {lora.folder.name} was merged into {len(lora.scalings)} layers of {model} before quantizing; "
            "the quality is that of the quantized model compared with the merged floats"
        )
        return job.run(on_event)


def like_base(folder: Path, settings: QuantConfig) -> QuantConfig:
    """`settings` with the grids and the format of a quantized model; unchanged for a float model."""
    checkpoint = Checkpoint.open(folder)
    declared = quantization_settings(checkpoint)
    if declared is None:
        return settings
    packed = PackedWeights(checkpoint)
    schemes = {module: packed.scheme(module) for module in packed.modules if packed.is_affine(module)}
    if not schemes:
        return settings
    common = Counter(schemes.values()).most_common(1)[0][0]
    floats = [name for name in linear_names(checkpoint, packed.modules).plain if name not in schemes]
    name = formats.detect(declared).name
    return settings.replace(
        scheme=common, skip=(*floats, *settings.skip), format=name if name in CONVERTIBLE else settings.format,
        overrides=(*(_override(module, own) for module, own in schemes.items() if own != common), *settings.overrides),
        quantize_head="lm_head" in schemes,
    )  # fmt: skip


def _override(module: str, scheme: WeightScheme) -> Override:
    return Override(pattern=module, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)


@contextmanager
def _merged(opened: Opened, adapter: Adapter, out: Path) -> Iterator[Path]:
    """The merged model as a float folder next to `out`, which is deleted at the end."""
    changes = {_stored_name(opened, path): path for path in adapter.scalings}
    checkpoint, parent = opened.checkpoint, out.absolute().parent
    with storing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix=".llmq-merged-", dir=parent)
    with place as name:
        folder = Path(name)
        part, tensors = 1, dict[str, Tensor]()
        for stored, tensor in _floats(opened):
            path = changes.pop(stored, None)
            tensors[stored] = tensor if path is None else _added(stored, tensor, adapter.change(path))
            if sum(own.nbytes for own in tensors.values()) > FILE_BYTES:
                write_tensors(folder / f"part-{part:05d}.safetensors", tensors)
                part, tensors = part + 1, {}
        write_tensors(folder / f"part-{part:05d}.safetensors", tensors)
        if changes:
            raise UnsupportedModelError(
                f"{min(changes)} is a part of a stacked tensor, into which no adapter can be merged yet",
                hint=MERGE_WITH_PEFT,
            )
        config = formats.with_settings(checkpoint.config, None, {})
        put_companions(folder, companions(checkpoint.folder).files, {})
        write_text(folder / CONFIG, json_text(config))
        date_by_contents(folder)
        yield folder


def _floats(opened: Opened) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the float model, by their names in the checkpoint; packed ones are dequantized."""
    checkpoint, packed = opened.checkpoint, opened.packed
    if packed is None:
        yield from ((name, checkpoint.tensor(name)) for name in checkpoint.names())
        return
    stored = {name for module in packed.modules for name in packed.tensor_names(module)}
    yield from ((name, checkpoint.tensor(name)) for name in checkpoint.names() if name not in stored)
    yield from ((name, packed.tensor(name)) for name in packed.weight_names())


def _stored_name(opened: Opened, path: str) -> str:
    """The name of a layer's weight in the checkpoint; raises CheckpointError if the model has no such layer."""
    name = opened.weights.stored_name(f"{path}.weight")
    if name is None:
        raise CheckpointError(
            f"the adapter changes {path}, which the model does not have", hint="give the model it was trained on"
        )
    return name


def _added(name: str, weight: Tensor, change: Tensor) -> Tensor:
    """The merged weight in its dtype; raises CheckpointError for other shapes."""
    if weight.shape != change.shape:
        raise CheckpointError(
            f"{name} is {tuple(weight.shape)}, but the adapter adds {tuple(change.shape)} to it",
            hint="give the model that the adapter was trained on",
        )
    return (weight.to(torch.float32) + change).to(weight.dtype)
