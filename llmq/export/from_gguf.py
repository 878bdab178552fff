"""Convert a .gguf file to an equivalent packed checkpoint, from which any other format can be made.

Q4_0, Q5_0 and Q8_0 are integer grids with one scale per group (`gguf/integer_blocks.py`), so their quantized values are
copied. All other block types have offsets or quantized scales, which no such grid can hold: a linear layer in one of
them is an error, unless it may be re-quantized. Embeddings, head and norms become floats again, in the dtype of the
model if exact, else in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import formats
from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.index import read_json_object
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.lock import emptied
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.sealed import sha256_of
from llmq.checkpoint.side_files import companions
from llmq.checkpoint.writer import CONFIG, Writer
from llmq.errors import ConfigError, FormatError, UnsupportedModelError
from llmq.export.conversion import Conversion, conversion_identity
from llmq.export.convert import Converter
from llmq.export.quantized_source import CHUNK_BYTES
from llmq.export.recode import requantize
from llmq.formats import tensor_name
from llmq.gguf import reader
from llmq.gguf.integer_blocks import EXACT, GROUP, unpacked
from llmq.gguf.reader import Weights
from llmq.model.build import skeleton, ties
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.numerics.gguf_types import GGUF
from llmq.numerics.scheme import WeightScheme
from llmq.report.events import OnEvent, Progress, ignore
from llmq.report.stored_record import read_record
from llmq.runtime.load import has_tokenizer
from llmq.steps import output_layout
from llmq.steps.linear_names import linear_names
from llmq.verification.integrity import checksum

FLOATS = ("F32", "F16", "BF16")
HEAD = "output.weight"
SOURCE_HINT = "give the original model with --source: its configuration and tokenizer are needed"


class GgufConverter:
    """A conversion of a .gguf file; otherwise like `Converter`.

    `like` is the folder of the original model. If the conversion is interrupted, converted weights are kept, but
    weights that were only unpacked from the file are not.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        to: str,
        *,
        like: Path | None = None,
        allow_requantize: bool = False,
        overwrite: bool = False,
    ) -> None:
        formats.load(to)  # raises ConfigError for an unknown format
        output_layout.require_folder_name(out)
        if to == GGUF:
            raise ConfigError(f"{source} is a .gguf file already", hint="give another format with --to")
        if out.resolve() == source.parent.resolve():
            raise ConfigError(
                f"{out} is the folder of {source.name}, expected another folder", hint="give another folder"
            )
        if like is None:
            require_described(source)
        elif out.resolve() == like.resolve():
            raise ConfigError(f"{out} is the original model, which is never changed", hint="give another output folder")
        self._unpacking = GgufSource(source, like, allow_requantize=allow_requantize)
        self._source, self._out, self._to = source, out, to
        self._options = {"allow_requantize": allow_requantize, "overwrite": overwrite}
        self.report = Conversion(str(source), str(out), GGUF, to)

    def run(self, on_event: OnEvent = ignore) -> None:
        """See `Converter.run`."""
        with with_source_hint():
            identity = self._unpacking.identity()
        allowed = self._options["allow_requantize"]
        self.report.request = sha256_of(conversion_identity(self._to, identity, allow_requantize=allowed))
        out = self._out.resolve()  # `.` has no name
        with emptied(out.with_name(f".{out.name}-unpacked")) as between:
            if not self._options["overwrite"]:
                if self.report.is_finished():
                    return
                Writer.require_free(self._out)
            folder = between / "model"
            with with_source_hint():
                self._unpacking.unpack(folder, on_event)
            converter = Converter(folder, self._out, self._to, **self._options, origin=self.report, identity=identity)
            converter.report.notes += self._unpacking.notes
            converter.report.requantized |= self._unpacking.requantized
            self.report = converter.report
            converter.run(on_event)


@contextmanager
def with_source_hint() -> Iterator[None]:
    """Add the hint to an error that the original model would avoid."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(str(error), hint=SOURCE_HINT) from error


class GgufSource:
    """A .gguf file that is unpacked to a checkpoint.

    requantized  ‖W - Ŵ‖ / ‖W‖ of each re-quantized linear layer
    floats       whether the model must be a float one, which is unpacked to a float checkpoint
    """

    def __init__(self, file: Path, like: Path | None, *, allow_requantize: bool = False, floats: bool = False) -> None:
        self.file, self._only_floats = file, floats
        self.requantized: dict[str, float] = {}
        self.notes: list[str] = []
        self._has_head = False  # whether the head has its own weight; known when unpacking
        self._like = like
        self._allowed = allow_requantize

    def identity(self) -> dict[str, Any]:
        """Plain values; two conversions with the same ones are the same."""
        with reader.described(self.file, self._like) as model:
            return identity_of(self.file, model)

    def unpack(self, folder: Path, on_event: OnEvent = ignore) -> None:
        """Write the checkpoint into `folder`.

        Raises ConfigError for block types that are not integer grids, UnsupportedModelError if the file does not
        describe its model sufficiently.
        """
        with reader.described(self.file, self._like) as model:
            weights = Weights(self.file, model)
            names = names_of(model, weights)
            weights.require_read(names)
            self._has_head = HEAD in weights.container.tensors
            layers = _linear_layers(model, weights, names)
            writer = Writer.open(folder, identity={"gguf": str(self.file)}, overwrite=False, needed_bytes=0)
            schemes: dict[str, WeightScheme] = {}
            tensors: dict[str, Tensor] = {}
            chunks = 0
            dtype = _dtype(model)
            for done, name in enumerate(names, 1):
                tensors |= self._tensors(name, weights, dtype, schemes, packable=name in layers)
                if sum(tensor.nbytes for tensor in tensors.values()) > CHUNK_BYTES:
                    writer.commit(chunks, tensors, {})
                    tensors, chunks = {}, chunks + 1
                on_event(Progress("unpacked", done, len(names), "weights", name))
            writer.commit(chunks, tensors, {})
            self._finish(writer, model, schemes)

    def _tensors(
        self, name: str, weights: Weights, dtype: torch.dtype, schemes: dict[str, WeightScheme], *, packable: bool
    ) -> dict[str, Tensor]:
        """The tensors that store one tensor of the model."""
        kind = weights.kind(name)
        module = name.removesuffix(".weight")
        if not packable or kind in FLOATS:
            return {name: self._float(name, weights.tensor(name), dtype)}
        if self._only_floats:
            raise ConfigError(
                f"{name} of {self.file} is {kind}, expected one of {', '.join(FLOATS)}: it is quantized already",
                hint="quantize the original model, or change the format of the file with llmq convert",
            )
        if kind in EXACT:
            q = unpacked(kind, weights.rows(name))
            if not torch.equal(q.dequantize(), weights.tensor(name)):
                raise FormatError(
                    f"{name} differs from its blocks in the file", hint="this is a bug in llmq: please report it"
                )
        elif self._allowed:
            recoded = requantize(
                weights.tensor(name), WeightScheme(8 if kind[1] in "5678" else 4, GROUP), torch.float16
            )
            q, self.requantized[module] = recoded.quantized, recoded.error or 0.0
        else:
            raise ConfigError(
                f"{name} is {kind}, expected {', '.join(EXACT)}: other blocks are not integer grids",
                hint="--allow-requantize re-quantizes such weights, which costs accuracy",
            )
        schemes[module] = q.scheme
        return {
            tensor_name(module, suffix): tensor
            for suffix, tensor in formats.load(output_layout.STAGED_FOR_GGUF).pack(q).items()
        }

    def _float(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        stored = tensor.to(dtype)
        if torch.equal(stored.to(torch.float32), tensor):
            return stored
        self.notes.append(
            f"{name} is stored as float32, because {str(dtype).removeprefix('torch.')} cannot hold it exactly"
        )
        return tensor

    def _finish(self, writer: Writer, model: Path, schemes: dict[str, WeightScheme]) -> None:
        if not schemes and not self._only_floats:
            raise ConfigError(
                f"{self.file} holds no quantized linear layer", hint="it is a float model, for llmq quantize"
            )
        config = config_of(model, has_head=self._has_head)
        layout = formats.load(output_layout.STAGED_FOR_GGUF)
        declared = {"quantization_config": layout.quantization_config(schemes, [])} if schemes else {}
        documents = {CONFIG: json_text({**config, **declared})}
        if schemes and (record := read_record(self.file.parent)):
            documents[PROVENANCE_FILE] = json_text(record)
        with writer.finishing() as final:
            writer.assemble(final, [], companions(model).files, documents)
        if not schemes:
            return
        checkpoint = Checkpoint.open(writer.folder)
        linears = linear_names(checkpoint, schemes)
        chosen = {name: schemes[module] for name, module in linears.packed.items()}
        config["quantization_config"] = layout.quantization_config(chosen, linears.plain)
        write_text(writer.folder / CONFIG, json_text(config))


def require_described(file: Path) -> None:
    """Raise UnsupportedModelError if configuration and tokenizer are not next to the file.

    What transformers derives from the file has neither class nor dtype, and maybe tokens that the embedding lacks.
    """
    if file.is_file() and not ((file.parent / CONFIG).is_file() and has_tokenizer(file.parent)):
        raise UnsupportedModelError(f"{CONFIG} and tokenizer are not next to {file}", hint=SOURCE_HINT)


def identity_of(file: Path, model: Path) -> dict[str, Any]:
    """The name, size and modification time of the file, and the model that describes it."""
    status = file.stat()
    weights = any(model.glob("*.safetensors"))
    like = Checkpoint.open(model).fingerprint() if weights else checksum(model / CONFIG)
    return {"file": file.name, "size": status.st_size, "changed": status.st_mtime_ns, "like": like}


def names_of(model: Path, weights: Weights) -> list[str]:
    """The names of the tensors as on the Hub: from the original model, if its weights are there.

    Otherwise those of transformers, the same except for experts. A head in the file is included, also a tied one.
    """
    built = skeleton.build(model, dtype=torch.float32, remote_code=False)
    if any(model.glob("*.safetensors")):
        return [name for name in ties.settled(Checkpoint.open(model), built).names() if name in weights]
    known = ModelWeights(built, weights.tensor, weights.__contains__)
    names = []
    for name, parameter in built.named_parameters(remove_duplicate=False):
        if known.is_tied(name):
            continue
        if parameter.dim() > 2:
            raise UnsupportedModelError(f"{name} holds the experts of a layer in one tensor", hint=SOURCE_HINT)
        names.append(known.tensor_name(name))
    return names


def config_of(model: Path, *, has_head: bool) -> dict[str, Any]:
    """The content of config.json for a file; a file with its own head is not tied."""
    config = read_json_object(model / CONFIG)
    if has_head and getattr(skeleton.load_config(model, remote_code=False), ties.KEY, False):
        return ties.untied_config(config)
    return config


def _linear_layers(model: Path, weights: Weights, names: list[str]) -> set[str]:
    """The weights of linear layers inside the blocks."""
    built = skeleton.build(model, dtype=torch.float32, remote_code=False)
    known = ModelWeights(built, weights.tensor, weights.__contains__)
    head: nn.Module | None = built.get_output_embeddings()  # type: ignore[operator]
    plain: set[str] = set()
    for path, module in built.named_modules():
        if module._parameters.get("weight") is not None and (not isinstance(module, nn.Linear) or module is head):
            plain.update(f"{candidate}.weight" for candidate in known.candidates(path))
    return {name for name in names if name.endswith(".weight") and name not in plain}


def _dtype(model: Path) -> torch.dtype:
    config = read_json_object(model / CONFIG)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16
