"""The end of a run: write the committed blocks to the output folder, or to one folder per format.

    one format       OUT/
    several          OUT/<format>/, each a complete model; the first safetensors one is assembled from the blocks, and
                     the others are converted from it and compared with it, weight by weight
    a .gguf file     OUT/<name of OUT>.gguf with configuration and tokenizer, or the same in OUT/gguf/; converted from a
                     safetensors model, or made from the blocks if these have a GGUF grid

All files are written inside the staging folder and moved out at the end.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmq import memory
from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.side_files import companions
from llmq.checkpoint.writer import CONFIG, Writer
from llmq.errors import CheckpointError, ConfigError, LlmqError, UnsupportedModelError
from llmq.export import card
from llmq.export.convert import Converter
from llmq.export.finished import next_steps
from llmq.formats import with_settings
from llmq.gguf.folder import blocks_to_gguf, export_gguf
from llmq.model.passes.streams import Text
from llmq.numerics.gguf_types import GGUF, GGUF_GRIDS
from llmq.report import summaries
from llmq.report.events import SAVING, Event, OnEvent, Progress
from llmq.report.expert_tokens import expert_tokens
from llmq.report.peak import peak_memory
from llmq.report.record import Report
from llmq.report.stored_record import read_record, write_record
from llmq.run_plan import Plan
from llmq.steps import fisher_information, output_layout, scale_range
from llmq.steps.end_to_end.memory_plan import disk_bytes
from llmq.steps.run import Run
from llmq.verification.integrity import checksums


def copies(formats: Sequence[str]) -> int:
    """How many times the weights are on disk at the end of a run: the blocks and all models made from them."""
    made = 1 + len(formats) - (output_layout.staged_format(formats) in formats)
    between = 2 if len(formats) > 1 else 0  # a format that is converted from another has a separate staging folder
    return 1 + made + between


def needed_bytes(plan: Plan, text: Text | None) -> int:
    """The disk space that a run needs for its result and, while it goes on, for tuning."""
    needed = copies(plan.settings.formats) * plan.expected_bytes
    if text is not None and plan.stages.tuning is not None:
        needed += disk_bytes(plan.skeleton, plan.layers.values(), plan.stages.tuning, text.whole or text)
    return needed + (fisher_information.disk_bytes(plan.skeleton) if plan.stages.needs_fisher else 0)


def finish(run: Run, plan: Plan, report: Report, start: float) -> None:
    """Complete the report of a run that began at `start`, and write the requested formats from the blocks.

    If one of several formats cannot be written, the others are written, and then its error is raised.
    """
    if run.streams is not None:
        report.notes += run.streams.notes
    quantized = {layer.name: layer for layer in report.layers}
    for layer in plan.layers.values():
        if layer.scheme.weights is not None and layer.name not in quantized:
            not_run = f"it was not run for the first {memory.PROBE_TOKENS} calibration tokens"
            report.left[layer.name] = scale_range.reason(layer.name, report.blocks) or not_run
    sizes = {layer.name: layer.weights for layer in plan.layers.values()}
    stored_bits = sum(sizes[name] * layer.bits_per_weight for name, layer in quantized.items())
    report.bits_per_weight = stored_bits / max(1, sum(sizes[name] for name in quantized))
    before = sum(plan.float_bytes(name) for name in quantized)
    report.file_bytes = plan.checkpoint.nbytes - before + round(stored_bits / 8)
    report.stages = [*summaries.of_layers(report.layers), *summaries.of_blocks(report.blocks)]
    report.experts = expert_tokens(report.layers)
    report.seconds = time.monotonic() - start
    report.peak_memory_bytes = peak_memory()
    repaired = replace(plan, layers=run.plans)  # with other grids for some layers
    _write(run.writer, repaired, report, set(quantized), run.on_event)


def _write(writer: Writer, plan: Plan, report: Report, quantized: set[str], on_event: OnEvent) -> None:
    """Assemble the folder or folders; `quantized` are the packed layers."""
    formats = plan.settings.formats
    on_event(Progress(SAVING, 0, len(formats), "formats"))
    if formats[0] in GGUF_GRIDS:
        _write_k_quants(writer, plan, report)
        on_event(Progress(SAVING, 1, 1, "formats"))
        return
    settings = plan.quantization_config(quantized)
    documents = {CONFIG: json_text(with_settings(plan.config_json(quantized), plan.layout, settings))}
    if plan.layout.config_copy:
        documents[plan.layout.config_copy] = json_text(settings)
    files = companions(plan.checkpoint.folder).files
    locations = {name: plan.checkpoint.location(name) for name in plan.outside()}
    rest = [(location.file, name, location.info) for name, location in locations.items()]
    if formats == (output_layout.staged_format(formats),):
        with writer.finishing() as final:
            writer.assemble(final, rest, files, documents)
            report.checksums = checksums(final)
            report.notes += card.write(final, plan.checkpoint.folder, report.to_dict())
            write_record(final, report.to_dict())
        on_event(Progress(SAVING, 1, 1, "formats"))
        return
    with writer.finishing() as final:
        staged = output_layout.staged_format(formats)
        folders = {name: final / name if len(formats) > 1 else final for name in formats}
        first = folders.get(staged) or writer.scratch()
        first.mkdir(exist_ok=True)
        documents[PROVENANCE_FILE] = json_text(report.to_dict())  # copied to the other formats
        writer.assemble(first, rest, files, documents)
        report.notes += card.write(first, plan.checkpoint.folder, report.to_dict())
        failed: dict[str, LlmqError] = {}
        for number, (name, folder) in enumerate(list(folders.items())):
            if name == staged:
                continue
            try:
                _make(first, folder, name, writer.folder, plan, report, _saving(on_event, number, len(formats)))
            except (CheckpointError, ConfigError, UnsupportedModelError) as error:
                if len(folders) == 1:
                    raise
                failed[name] = error
                shutil.rmtree(folder, ignore_errors=True)
                del folders[name]
                report.notes.append(f"{name} was not written: {error}")
        _record_sizes(folders, report)
        on_event(Progress(SAVING, len(formats), len(formats), "formats"))
    if failed:
        last = list(failed.values())[-1]
        steps = next_steps(*([writer.folder / name for name in names] for names in (folders, failed)))
        raise type(last)(str(last), hint=f"{last.hint}; {steps}" if last.hint else steps) from last


def _write_k_quants(writer: Writer, plan: Plan, report: Report) -> None:
    """Assemble a .gguf file from blocks whose grid is one of llama.cpp's k-quants."""
    with writer.finishing() as final:
        written = blocks_to_gguf(
            writer.parts(),
            plan.checkpoint,
            plan.outside(),
            plan.settings,
            plan.device,
            final,
            writer.folder,
            plan.importance,
        )
        report.notes += written.notes
        report.file_bytes = written.file.stat().st_size
        report.checksums = checksums(final)
        report.notes += card.write(final, plan.checkpoint.folder, report.to_dict())
        write_record(final, report.to_dict())


def _saving(on_event: OnEvent, finished: int, formats: int) -> OnEvent:
    """Report the progress of one conversion as that of saving; a conversion consists of packing and comparing."""

    def pass_on(event: Event) -> None:
        if isinstance(event, Progress):
            part = (event.done / max(1, event.total) + (event.stage == "compared")) / 2
            share = (finished + part) / formats
            on_event(Progress(SAVING, finished, formats, "formats", f"{event.stage} {event.detail}", share=share))

    return pass_on


def _make(source: Path, folder: Path, to: str, out: Path, plan: Plan, report: Report, on_event: OnEvent) -> None:
    """Convert the model in `source` to another format, and compare both; `out` is the output folder of the user."""
    if to == GGUF:
        folder.mkdir(exist_ok=True)
        summary = export_gguf(source, folder, out)
        report.notes += [*summary.notes, f"{to}: {len(summary.exact)} weights compared, 0 differ"]
        record = read_record(source)
        card.write(folder, source, record)
        write_text(folder / PROVENANCE_FILE, json_text(record))
        return
    converter = Converter(source, folder, to, remote_code=plan.remote_code)
    converter.run(on_event)
    report.notes.append(f"{to}: {converter.report.compared} weights compared, {converter.report.differ} differ")


def _record_sizes(folders: Mapping[str, Path], report: Report) -> None:
    """Add the size of every format to each record."""
    for name, folder in folders.items():
        weights = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")]
        report.sizes[name] = sum(file.stat().st_size for file in weights)
    for name, folder in folders.items():
        own = read_record(folder).get("checksums") or checksums(folder)  # a converter has recorded them
        report.checksums |= {f"{name}/{file}" if len(folders) > 1 else file: sha for file, sha in own.items()}
        changed = {"sizes": report.sizes, "notes": report.notes, "checksums": own, "request": report.request}
        write_record(folder, {**read_record(folder), **changed})
