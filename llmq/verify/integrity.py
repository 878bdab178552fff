"""Is a model on the disk whole: headers, index, shapes, what config.json says, and every number in it.

Every tensor is read once, one at a time.  Packed weights are unpacked by the code that loads them, so what is found
here is what loading, or worse, computing would have found.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmq import formats
from llmq.checkpoint.index import read_json_object
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import reading
from llmq.checkpoint.writer import CONFIG
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.model.build import skeleton
from llmq.model.build.checkpoint_names import ModelWeights, require_finite
from llmq.report.events import OnEvent, Progress, ignore
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.verify.inspection import read_record

WEIGHTS = (".safetensors", ".gguf")


@dataclass
class Integrity:
    """What was looked at, and what is wrong.

    checksums  files whose SHA-256 is what it was when they were written
    """

    tensors: int = 0
    packed: int = 0
    nbytes: int = 0
    checksums: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(model: Path, *, remote_code: bool = False, on_event: OnEvent = ignore) -> Integrity:
    """Read a model, a folder or one .gguf file, every tensor of it.

    Raises FormatError for a format that llmq does not read: nothing is known of the model then.
    """
    integrity = Integrity()
    alone = model.suffix == ".gguf" and not model.is_dir()
    folder = model.parent if alone else model
    gguf = [model] if alone else sorted(folder.glob("*.gguf"))
    if (folder / CONFIG).is_file() and not gguf:
        settings = read_json_object(folder / CONFIG).get("quantization_config")
        if isinstance(settings, dict):
            formats.detect(settings)
    try:
        if gguf and (alone or not list(folder.glob("*.safetensors"))):
            _examine_gguf(gguf, integrity, on_event)
        else:
            _examine(Checkpoint.open(folder), integrity, on_event, remote_code=remote_code)
        _compare_checksums(folder, integrity, only=model.name if alone else None)
    except CheckpointError as error:
        integrity.problems.append(str(error))
    return integrity


def checksum(file: Path) -> str:
    """SHA-256 in hexadecimal."""
    with reading(file), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Those of a folder's weights, by the names of the files."""
    files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
    return {file.name: checksum(file) for file in files}


def _examine(checkpoint: Checkpoint, found: Integrity, on_event: OnEvent, *, remote_code: bool) -> None:
    packed = None if quantization_settings(checkpoint) is None else PackedWeights(checkpoint)
    modules = packed.modules if packed else []
    in_packed = {name for module in modules for name in packed.tensor_names(module)} if packed else set[str]()
    rest = [name for name in checkpoint.names() if name not in in_packed]
    if packed is not None and not modules:
        found.problems.append("config.json has a quantization_config, and no weight is packed")
    done, total = 0, len(modules) + len(rest)
    for module in modules:
        assert packed is not None
        with _collecting(found):
            _require_sound(module, packed)
        done += 1
        on_event(Progress("reading", done, total, "tensors", module))
    for name in rest:
        with _collecting(found):
            tensor = checkpoint.tensor(name)
            if tensor.is_floating_point():
                require_finite(name, tensor)
        done += 1
        on_event(Progress("reading", done, total, "tensors", name))
    found.tensors, found.packed, found.nbytes = len(rest), len(modules), checkpoint.nbytes
    _require_complete(checkpoint, modules, found, remote_code=remote_code)


class _collecting:
    """Keeps what is wrong with one tensor, so that the others are looked at too."""

    def __init__(self, found: Integrity) -> None:
        self._found = found

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, CheckpointError):
            self._found.problems.append(str(error))
            return True
        return False


def _require_sound(module: str, packed: PackedWeights) -> None:
    """Raise CheckpointError for weights and scales that are no numbers, and zeros outside of the grid."""
    if not packed.is_affine(module):
        require_finite(module, packed.weight(module))
        return
    q = packed.read(module)
    require_finite(module, q.dequantize())
    require_finite(f"{module}: scales", q.scales)
    if q.zeros is not None and (int(q.zeros.min()) < 0 or int(q.zeros.max()) > q.scheme.levels + 1):
        raise CheckpointError(f"{module}: zeros are {int(q.zeros.min())} to {int(q.zeros.max())} on a grid {q.scheme}")


def _require_complete(checkpoint: Checkpoint, modules: list[str], found: Integrity, *, remote_code: bool) -> None:
    """Every parameter that transformers' model has must have a tensor."""
    try:
        model = skeleton.build(checkpoint.folder, dtype=torch.float32, remote_code=remote_code)
    except (UnsupportedModelError, CheckpointError) as error:
        found.notes.append(f"whether every parameter has a tensor is not known: {error}")
        return
    weights = ModelWeights(model, checkpoint.tensor, checkpoint.__contains__)
    packed, parameters = set(modules), dict(model.named_parameters())
    taken_apart = {  # modules of stacked experts, whose weights and biases have names of their own on the disk
        name.rpartition(".")[0] for name, parameter in parameters.items() if parameter.dim() > 2 and weights.lacks(name)
    }
    absent = []
    for name in parameters:
        module = name.removesuffix(".weight")
        if name.rpartition(".")[0] in taken_apart or any(each in packed for each in weights.candidates(module)):
            continue
        try:
            weights.tensor_name(name)
        except CheckpointError:
            absent.append(name)
    if absent:
        found.problems.append(f"no tensor is there for {absent[0]} ({len(absent)} parameters in all)")


def _examine_gguf(files: list[Path], found: Integrity, on_event: OnEvent) -> None:
    from llmq.gguf.container import Container

    for file in files:
        container = Container(file)
        for done, (name, info) in enumerate(container.tensors.items(), 1):
            with _collecting(found):
                require_finite(name, container.floats(name))
            if info.kind in ("F32", "F16", "BF16"):
                found.tensors += 1
            else:
                found.packed += 1
            on_event(Progress("reading", done, len(container.tensors), "tensors", name))
        found.nbytes += sum(info.nbytes for info in container.tensors.values())


def _compare_checksums(folder: Path, found: Integrity, *, only: str | None) -> None:
    """With what was written down when the files were made, if anything was; `only` of the file of that name."""
    recorded = read_record(folder).get("checksums")
    if isinstance(recorded, dict) and only is not None:
        recorded = {name: expected for name, expected in recorded.items() if name == only}
    if not isinstance(recorded, dict) or not recorded:
        found.notes.append("no checksums were recorded when the files were written")
        return
    for name, expected in recorded.items():
        if not (folder / name).is_file():
            found.problems.append(f"{name} is not there, and llmq.json knows it")
        elif checksum(folder / name) != expected:
            found.problems.append(f"{name} is not what was written: its SHA-256 is another one than llmq.json says")
        else:
            found.checksums += 1
