"""The end of a run: committed blocks -> the folder, or folders, that the user asked for.

    one format       OUT/
    several          OUT/<format>/, each a complete model; the first of safetensors is put together from the blocks, and
                     the others are made from it and compared with it, weight by weight
    a .gguf file     OUT/<name of OUT>.gguf beside configuration and tokenizer, or the same in OUT/gguf/; made from a
                     model of safetensors, or from the blocks where these have a grid that no other file holds

Everything is made inside the staging and moved out at the very end.
"""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.side_files import companion_files
from llmq.checkpoint.writer import CONFIG, Writer
from llmq.errors import CheckpointError, ConfigError, LlmqError, UnsupportedModelError
from llmq.export.convert import Converter
from llmq.export.to_gguf import blocks_to_gguf, export_gguf
from llmq.numerics.gguf_types import GGUF, GGUF_GRIDS
from llmq.plan import Plan
from llmq.report.events import OnEvent
from llmq.report.record import Report
from llmq.steps import output_layout
from llmq.verify.inspection import read_record
from llmq.verify.integrity import checksums


def copies(formats: Sequence[str]) -> int:
    """How many times the weights are on the disk at the end of a run: the blocks, and what is made of them."""
    made = 1 + len(formats) - (output_layout.staged_format(formats) in formats)
    between = 2 if len(formats) > 1 else 0  # a format that is made of another one is staged on its own
    return 1 + made + between


def finish(writer: Writer, plan: Plan, report: Report, quantized: set[str], on_event: OnEvent) -> None:
    """Make what was asked for of the blocks; `quantized` are the layers that are packed in them.

    Where one of several formats cannot be written, the others are, and then its error is raised.
    """
    formats = plan.settings.formats
    if formats[0] in GGUF_GRIDS:
        with writer.finishing() as final:
            written = blocks_to_gguf(writer.parts(), plan, final, writer.folder)
            report.notes += written.notes
            report.file_bytes = written.file.stat().st_size
            report.checksums = checksums(final)
            write_text(final / PROVENANCE_FILE, json_text(report.to_dict()))
        return
    settings = plan.quantization_config(quantized)
    documents = {CONFIG: json_text({**plan.config_json(quantized), "quantization_config": settings})}
    if plan.layout.config_copy:
        documents[plan.layout.config_copy] = json_text(settings)
    files = companion_files(plan.checkpoint.folder)
    locations = {name: plan.checkpoint.location(name) for name in plan.outside()}
    rest = [(location.file, name, location.info) for name, location in locations.items()]
    if formats == (output_layout.staged_format(formats),):
        with writer.finishing() as final:
            writer.assemble(final, rest, files, documents)
            report.checksums = checksums(final)
            write_text(final / PROVENANCE_FILE, json_text(report.to_dict()))
        return
    with writer.finishing() as final:
        staged = output_layout.staged_format(formats)
        folders = {name: final / name if len(formats) > 1 else final for name in formats}
        first = folders.get(staged) or writer.scratch()
        first.mkdir(exist_ok=True)
        documents[PROVENANCE_FILE] = json_text(report.to_dict())  # the others take theirs from it
        writer.assemble(first, rest, files, documents)
        failed: dict[str, LlmqError] = {}
        for name, folder in list(folders.items()):
            if name == staged:
                continue
            try:
                _make(first, folder, name, writer.folder, plan, report, on_event)
            except (CheckpointError, ConfigError, UnsupportedModelError) as error:
                if len(folders) == 1:
                    raise
                failed[name] = error
                shutil.rmtree(folder, ignore_errors=True)
                del folders[name]
                report.notes.append(f"{name} was not written: {error}")
        _tell_sizes(folders, report)
    if failed:
        last = list(failed.values())[-1]
        way_on = _way_on(writer.folder, staged, list(folders), list(failed))
        raise type(last)(str(last), hint=f"{last.hint}; {way_on}" if last.hint else way_on) from last


def _way_on(out: Path, staged: str, finished: Sequence[str], failed: Sequence[str]) -> str:
    """What there is, and how the rest is made of it."""
    commands = [shlex.join(["llmq", "convert", str(out / staged), str(out / name), "--to", name]) for name in failed]
    return f"{', '.join(finished)} are finished, in {out}; without quantizing again: {' and '.join(commands)}"


def _make(source: Path, folder: Path, to: str, out: Path, plan: Plan, report: Report, on_event: OnEvent) -> None:
    """The model in `source` once more in another format, compared with it; `out` is what the user named."""
    if to == GGUF:
        folder.mkdir(exist_ok=True)
        summary = export_gguf(source, folder, out)
        report.notes += [*summary.notes, f"{to}: {len(summary.exact)} weights compared, 0 differ"]
        write_text(folder / PROVENANCE_FILE, json_text(read_record(source)))
        return
    converter = Converter(source, folder, to, remote_code=plan.remote_code)
    converter.run(on_event)
    report.notes.append(f"{to}: {converter.report.compared} weights compared, {converter.report.differ} differ")


def _tell_sizes(folders: Mapping[str, Path], report: Report) -> None:
    """Write down in each record what each format takes."""
    for name, folder in folders.items():
        weights = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")]
        report.sizes[name] = sum(file.stat().st_size for file in weights)
    for name, folder in folders.items():
        own = checksums(folder)
        report.checksums |= {f"{name}/{file}" if len(folders) > 1 else file: each for file, each in own.items()}
        record = {**read_record(folder), "sizes": report.sizes, "notes": report.notes, "checksums": own}
        write_text(folder / PROVENANCE_FILE, json_text(record))
