"""Check the integrity of a model on disk: headers, index, shapes, every value, and the files next to the weights.

Every tensor is read once, one at a time. Packed weights are unpacked by the same code as in loading, so the check finds
the errors that loading or running the model would cause.
"""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmq import formats
from llmq.checkpoint import PAGE_FILES, PROVENANCE_FILE
from llmq.checkpoint.confined import confined
from llmq.checkpoint.index import ONNX_FILE, is_onnx, read_json_object
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import reading
from llmq.checkpoint.writer import CONFIG
from llmq.errors import CheckpointError
from llmq.model.build.checkpoint_names import require_finite
from llmq.report.events import OnEvent, Progress, ignore
from llmq.report.stored_record import read_record
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.open_skeleton import compared
from llmq.runtime.whole_model import without_effect
from llmq.verification import companions

# Files whose change does not change the model: the record itself, and texts for people.
NAMES = "|".join(map(re.escape, (PROVENANCE_FILE, *PAGE_FILES)))
NOT_THE_MODEL = re.compile(
    rf"{NAMES}|.*\.md|(licen[cs]e|notice|readme|copying)(\..*)?",
    re.IGNORECASE,
)


@dataclass
class Integrity:
    """The result: how much was checked, and all problems.

    checksums  number of files with the recorded SHA-256
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
    """Read and check every tensor of a model, a folder or a .gguf file.

    Raises FormatError for a format, or settings of one, that llmq cannot read.
    """
    integrity = Integrity()
    alone = model.suffix == ".gguf" and not model.is_dir()
    folder = model.parent if alone else model
    gguf = [model] if alone else sorted(folder.glob("*.gguf"))
    if (folder / CONFIG).is_file() and not gguf:
        settings = read_json_object(folder / CONFIG).get("quantization_config")
        if isinstance(settings, dict):
            formats.detect(settings).read_config(settings)
    try:
        if not alone and is_onnx(folder):
            integrity.nbytes = sum(file.stat().st_size for file in folder.glob(f"{ONNX_FILE}*"))
            integrity.notes.append("only checksums of the ONNX graph were compared: --run onnxruntime runs it")
        elif gguf and (alone or not list(folder.glob("*.safetensors"))):
            _examine_gguf(gguf, integrity, on_event)
        else:
            _examine(Checkpoint.open(folder), integrity, on_event, remote_code=remote_code)
        if not alone or (folder / CONFIG).is_file():
            integrity.problems += companions.problems(folder, remote_code=remote_code)
            integrity.notes += companions.notes(folder)
        _compare_checksums(folder, integrity, only=model.name if alone else None)
    except CheckpointError as error:
        integrity.problems.append(str(error))
    return integrity


def checksum(file: Path) -> str:
    """The SHA-256 of the contents of a file, in hexadecimal."""
    with reading(file), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """The checksums of the files of a model, by their names in its folder; texts for people are left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not NOT_THE_MODEL.fullmatch(file.name))
    return {file.relative_to(folder).as_posix(): checksum(file) for file in files}


def _examine(checkpoint: Checkpoint, integrity: Integrity, on_event: OnEvent, *, remote_code: bool) -> None:
    packed = None if quantization_settings(checkpoint) is None else PackedWeights(checkpoint)
    modules = packed.modules if packed else []
    in_packed = {name for module in modules for name in packed.tensor_names(module)} if packed else set[str]()
    rest = [name for name in checkpoint.names() if name not in in_packed]
    if packed is not None and not modules:
        integrity.problems.append("config.json has a quantization_config, but no weight is packed")
    done, total = 0, len(modules) + len(rest)
    for module in modules:
        assert packed is not None
        with _collecting(integrity):
            _require_sound(module, packed)
        done += 1
        on_event(Progress("reading", done, total, "tensors", module))
    for name in rest:
        with _collecting(integrity):
            tensor = checkpoint.tensor(name)
            if tensor.is_floating_point() and not without_effect(name, checkpoint):
                require_finite(name, tensor)
        done += 1
        on_event(Progress("reading", done, total, "tensors", name))
    integrity.tensors, integrity.packed, integrity.nbytes = len(rest), len(modules), checkpoint.nbytes
    _require_complete(checkpoint, integrity, remote_code=remote_code)


class _collecting:
    """Collects the problems of a tensor, so that the other tensors are checked as well."""

    def __init__(self, integrity: Integrity) -> None:
        self._integrity = integrity

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, CheckpointError):
            self._integrity.problems.append(str(error))
            return True
        return False


def _require_sound(module: str, packed: PackedWeights) -> None:
    """Raise CheckpointError for weights and scales that are not finite, and zero points outside the grid."""
    if not packed.is_affine(module):
        require_finite(module, packed.weight(module))
        return
    q = packed.read(module)
    require_finite(module, q.dequantize())
    require_finite(f"{module}: scales", q.scales)
    if q.zeros is not None and (int(q.zeros.min()) < 0 or int(q.zeros.max()) > q.scheme.levels + 1):
        low, high = int(q.zeros.min()), int(q.zeros.max())
        raise CheckpointError(f"{module}: zero points are {low} to {high} on a grid {q.scheme}")


def _require_complete(checkpoint: Checkpoint, integrity: Integrity, *, remote_code: bool) -> None:
    """Add a problem if a parameter of the model has no tensor, or if no parameter needs a tensor."""
    with _collecting(integrity):
        integrity.notes += compared(checkpoint, remote_code=remote_code).notes


def _examine_gguf(files: list[Path], integrity: Integrity, on_event: OnEvent) -> None:
    from llmq.gguf.container import Container

    for file in files:
        container = Container(file)
        for done, (name, info) in enumerate(container.tensors.items(), 1):
            with _collecting(integrity):
                require_finite(name, container.floats(name))
            if info.kind in ("F32", "F16", "BF16"):
                integrity.tensors += 1
            else:
                integrity.packed += 1
            on_event(Progress("reading", done, len(container.tensors), "tensors", name))
        integrity.nbytes += sum(info.nbytes for info in container.tensors.values())


def _compare_checksums(folder: Path, integrity: Integrity, *, only: str | None) -> None:
    """Compare the checksums with those recorded when the files were written; `only` for the file with that name."""
    recorded = read_record(folder).get("checksums")
    if isinstance(recorded, dict) and only is not None:
        recorded = {name: expected for name, expected in recorded.items() if name == only}
    if not isinstance(recorded, dict) or not recorded:
        integrity.notes.append("no checksums were recorded when the files were written")
        return
    for name, expected in recorded.items():
        file = confined(folder, name)
        if file is None:
            integrity.problems.append(f"llmq.json lists {name!r}, which is not in the folder of the model")
        elif not file.is_file():
            integrity.problems.append(f"{name} is missing, but listed in llmq.json")
        elif checksum(file) != expected:
            integrity.problems.append(f"{name} has changed: its SHA-256 differs from the one in llmq.json")
        else:
            integrity.checksums += 1
