"""`llmq merge`: a LoRA adapter merged into a model, and the merged weights quantized with calibration text.

    float or dequantized weights + adapter ──► a temporary float folder ──► quantized as by `llmq quantize`

A merged weight does not lie on the grid of its base any more, so it is rounded again. Weights of a quantized base that
the adapter does not touch are still on their grid, and keep their values exactly (`steps/existing_grids.py`), except
those on nvfp4, which a run does not recognize. The verdict of the run is the cost of the merge: the finished
model against the merged floats, next to round to nearest.
"""

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
from llmq.checkpoint.lock import emptied
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import write_tensors
from llmq.checkpoint.side_files import companions
from llmq.checkpoint.writer import CONFIG, put_companions
from llmq.config import CONVERTIBLE, Override, QuantConfig
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.formats.codecs.checks import is_head
from llmq.job import Job
from llmq.numerics.keep_floats import RECOGNIZED
from llmq.numerics.scheme import ACTIVATIONS, Scheme
from llmq.report.events import OnEvent, ignore
from llmq.report.record import Report
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.open_skeleton import Opened, open_model
from llmq.steps.linear_names import linear_names
from llmq.training.adapter import MERGE_WITH_PEFT, Adapter

ACTIVATION_NAMES = {inputs: name for name, inputs in ACTIVATIONS.items()}
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
        job.report.notes += _rounded_again(opened.packed)
        return job.run(on_event)


def like_base(folder: Path, settings: QuantConfig) -> QuantConfig:
    """`settings` with the grids and the format of a quantized model; unchanged for a float model."""
    checkpoint = Checkpoint.open(folder)
    declared = quantization_settings(checkpoint)
    if declared is None:
        return settings
    packed = PackedWeights(checkpoint)
    schemes = {
        module: Scheme(packed.scheme(module), packed.declared_inputs(module))
        for module in packed.modules
        if _can_be_written(packed, module)
    }
    if not schemes:
        return settings
    common = Counter(schemes.values()).most_common(1)[0][0]
    names = linear_names(checkpoint, packed.modules)
    floats = [name for name in names.plain if name not in packed.modules]
    own = {name: schemes[module] for name, module in names.packed.items() if module in schemes}
    layout = formats.detect(declared).name
    return settings.replace(
        scheme=common.weights, activations=ACTIVATION_NAMES[common.inputs], skip=(*floats, *settings.skip),
        overrides=(*(_override(name, scheme) for name, scheme in own.items() if scheme != common), *settings.overrides),
        format=layout if layout in CONVERTIBLE else settings.format, quantize_head=any(map(is_head, names.packed)),
    )  # fmt: skip


def _can_be_written(packed: PackedWeights, module: str) -> bool:
    """Whether the grid of a weight is one that `llmq quantize` writes."""
    return packed.is_affine(module) or packed.scheme(module).floats is not None


def _override(module: str, scheme: Scheme) -> Override:
    weights, activations = scheme.weights, ACTIVATION_NAMES[scheme.inputs]
    assert weights is not None, "a packed layer has quantized weights"
    if weights.floats is not None:
        return Override(pattern=module, bits=weights.floats, activations=activations)
    return Override(
        pattern=module, bits=weights.bits, group_size=weights.group_size, symmetric=weights.symmetric,
        activations=activations,
    )  # fmt: skip


def _rounded_again(packed: PackedWeights | None) -> list[str]:
    """Notes on weights whose grid a run does not recognize, so that they are rounded again in any case."""
    if packed is None:
        return []
    others = [module for module in packed.modules if not (packed.is_affine(module) or _is_recognized(packed, module))]
    grids = Counter(packed.grid(module) for module in others)
    written = {packed.grid(module) for module in others if _can_be_written(packed, module)}
    return [
        f"{count} layers are stored as {grid}: they were rounded again, "
        + ("also those that the adapter does not change" if grid in written else "to another grid")
        for grid, count in grids.items()
    ]


def _is_recognized(packed: PackedWeights, module: str) -> bool:
    return packed.scheme(module).floats in RECOGNIZED


@contextmanager
def _merged(opened: Opened, adapter: Adapter, out: Path) -> Iterator[Path]:
    """The merged model as a float folder next to `out`, which is deleted at the end."""
    changes: dict[str, str] = {}
    for path in adapter.scalings:
        stored = _stored_name(opened, path)
        if stored in changes:
            raise CheckpointError(f"the adapter changes {stored} twice: as {changes[stored]} and {path}")
        changes[stored] = path
    checkpoint, out = opened.checkpoint, out.absolute()
    with emptied(out.with_name(f".{out.name}-merged")) as between:
        folder = between / "model"
        with storing(folder):
            folder.mkdir()
        part, tensors = 1, dict[str, Tensor]()
        for stored, tensor in _floats(opened):
            changed = changes.pop(stored, None)
            tensors[stored] = tensor if changed is None else _added(stored, tensor, adapter, changed)
            if sum(own.nbytes for own in tensors.values()) > FILE_BYTES:
                write_tensors(folder / f"part-{part:05d}.safetensors", tensors)
                part, tensors = part + 1, {}
        write_tensors(folder / f"part-{part:05d}.safetensors", tensors)
        if changes:
            raise UnsupportedModelError(
                f"{min(changes)} is a part of a stacked tensor, into which no adapter can be merged yet",
                hint=MERGE_WITH_PEFT,
            )
        put_companions(folder, companions(checkpoint.folder).files, {})
        write_text(folder / CONFIG, json_text(formats.float_config(checkpoint.config)))
        date_by_contents(folder)
        yield folder


def _floats(opened: Opened) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the float model, by their names in the checkpoint; packed ones are dequantized."""
    checkpoint, packed = opened.checkpoint, opened.packed
    if packed is None:
        yield from ((name, checkpoint.tensor(name)) for name in checkpoint.names())
        return
    stored = {name for module in packed.modules for name in packed.tensor_names(module)}
    others = [name for name in checkpoint.names() if name not in stored and not packed.is_noted(name)]
    yield from ((name, checkpoint.tensor(name)) for name in others)
    yield from ((name, packed.tensor(name)) for name in packed.weight_names())


def _stored_name(opened: Opened, path: str) -> str:
    """The name of a layer's weight in the checkpoint; raises CheckpointError if the model has no such layer."""
    name = opened.weights.stored_name(f"{path}.weight")
    if name is None:
        raise CheckpointError(
            f"the adapter changes {path}, which the model does not have as a separate tensor",
            hint="give the model it was trained on; a head that is tied to the embedding cannot be merged alone",
        )
    return name


def _added(name: str, weight: Tensor, adapter: Adapter, path: str) -> Tensor:
    """The merged weight in its dtype; raises CheckpointError for other shapes."""
    if tuple(weight.shape) != adapter.shapes[path]:  # before the product, which may be much larger than its factors
        raise CheckpointError(
            f"{name} is {tuple(weight.shape)}, but the adapter adds {adapter.shapes[path]} to it",
            hint="give the model that the adapter was trained on",
        )
    return (weight.to(torch.float32) + adapter.change(path)).to(weight.dtype)
