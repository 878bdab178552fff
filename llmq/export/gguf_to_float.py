"""Convert a .gguf file of any block types to a float checkpoint: a plain Hugging Face folder with the same weights.

Every tensor is written as the floats that llama.cpp computes with, under its name in the original model: K-quants, IQ4
and the integer types alike. float32 holds them exactly; a narrower dtype rounds, as in `float_folder.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.side_files import companions
from llmq.checkpoint.writer import CONFIG, Writer
from llmq.errors import ConfigError, FormatError
from llmq.export import FLOAT, card
from llmq.export.conversion import Conversion, conversion_identity, record_of, writing
from llmq.export.float_folder import in_floats, narrowed, relative_error, rounded_note
from llmq.export.from_gguf import HEAD, config_of, identity_of, names_of, require_described, with_source_hint
from llmq.export.quantized_source import CHUNK_BYTES
from llmq.gguf import reader
from llmq.gguf.reader import Weights
from llmq.numerics.gguf_types import GGUF
from llmq.report.events import OnEvent, Progress, ignore
from llmq.report.stored_record import read_record
from llmq.verification.integrity import checksums


class GgufFloatConverter:
    """One conversion to floats: `run` performs it, `report` is the result.

    `like` is the folder of the original model. Raises UnsupportedModelError for a file that does not describe its
    model, if there is none.
    """

    def __init__(
        self, source: Path, out: Path, dtype: str, *, like: Path | None = None, overwrite: bool = False
    ) -> None:
        for taken in (source.parent, *([like] if like is not None else [])):
            if out.resolve() == taken.resolve():
                raise ConfigError(f"{out} is a source of the conversion", hint="give another output folder")
        if like is None:
            require_described(source)
        self._source, self._out, self._like, self._overwrite = source, out, like, overwrite
        self._name, self._dtype = dtype, getattr(torch, dtype)
        self._rounded: dict[str, float] = {}  # ‖W - Ŵ‖ / ‖W‖ of weights that the dtype does not hold exactly
        self.report = Conversion(str(source), str(out), GGUF, FLOAT, source_bytes=source.stat().st_size)

    def run(self, on_event: OnEvent = ignore) -> None:
        """Convert the file. The finished folder appears at the end, unless an equal conversion has written it."""
        with with_source_hint(), reader.described(self._source, self._like) as model:
            identity = conversion_identity(FLOAT, identity_of(self._source, model), dtype=self._name)
            if self.report.is_done(self._out, identity, overwrite=self._overwrite):
                return
            weights = Weights(self._source, model)
            names = names_of(model, weights)
            weights.require_read(names)
            needed = 2 * self._dtype.itemsize * sum(weights.size(name) for name in names)
            with writing(self._out, identity, overwrite=self._overwrite, needed_bytes=needed) as writer:
                self._convert(writer, weights, names, on_event)
                with writer.finishing() as final:
                    self._finish(writer, final, model, weights, names, on_event)

    def _convert(self, writer: Writer, weights: Weights, names: list[str], on_event: OnEvent) -> None:
        """Write the floats of every tensor into the staging folder, some at a time."""
        done = 0
        for index, chunk in enumerate(_chunks(weights, names, self._dtype.itemsize)):
            if not writer.has(index):
                tensors: dict[str, Tensor] = {}
                rounded: dict[str, float] = {}
                for name in chunk:
                    weight = weights.tensor(name)
                    tensors[name] = narrowed(name, weight, self._dtype)
                    if (error := relative_error(weight, tensors[name])) > 0:
                        rounded[name] = error
                    on_event(Progress("converted", done + len(tensors), len(names), "weights", name))
                writer.commit(index, tensors, {"rounded": rounded})
            done += len(chunk)
            self._rounded |= writer.read(index)[1]["rounded"]

    def _finish(
        self, writer: Writer, final: Path, model: Path, weights: Weights, names: list[str], on_event: OnEvent
    ) -> None:
        """Assemble the model in `final`, and compare it with the source."""
        config = config_of(model, has_head=HEAD in weights.container.tensors)
        writer.assemble(final, [], companions(model).files, {CONFIG: json_text(in_floats(config, self._name))})
        made = Checkpoint.open(final)
        for done, name in enumerate(names, 1):
            if not torch.equal(weights.tensor(name).to(self._dtype), made.tensor(name)):
                raise FormatError(
                    f"{name} in the new file differs from the source; no model was written",
                    hint="check the disk; if it is sound, this is a bug in llmq: please report it",
                )
            on_event(Progress("compared", done, len(names), "weights", name))
        self.report.compared, self.report.differ = len(names), len(self._rounded)
        self.report.output_bytes = made.nbytes
        if self._rounded:
            self.report.notes.append(rounded_note(self._rounded, len(names), self._name))
        record = {**record_of(self.report, read_record(self._source.parent)), "checksums": checksums(final)}
        self.report.notes += card.write(final, model, record)
        write_text(final / PROVENANCE_FILE, json_text(record))


def _chunks(weights: Weights, names: list[str], itemsize: int) -> Iterator[list[str]]:
    """The names in parts of about `CHUNK_BYTES` of floats, in order."""
    chunk, filled = list[str](), 0
    for name in names:
        nbytes = weights.size(name) * itemsize
        if chunk and filled + nbytes > CHUNK_BYTES:
            yield chunk
            chunk, filled = [], 0
        chunk.append(name)
        filled += nbytes
    yield chunk
