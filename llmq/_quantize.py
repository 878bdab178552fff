"""`llmq.quantize`, and the jobs of one command: one, or one per grid (`steps/separate_grids.py`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

from llmq._keywords import Keywords
from llmq.calibration.given import from_python
from llmq.checkpoint.in_memory import Savable
from llmq.config import QuantConfig
from llmq.export.model_of_run import opened
from llmq.job import Job
from llmq.methods import Method
from llmq.report import bar
from llmq.report.events import OnEvent, ignore
from llmq.report.record import Report
from llmq.setting_fields import merged
from llmq.steps import separate_grids
from llmq.steps.separate_grids import GridRun


def quantize(
    model: str | Path | Savable,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    config: QuantConfig | None = None,
    device: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    stages: Method | None = None,
    progress: bool = True,
    on_event: OnEvent = ignore,
    **settings: Unpack[Keywords],
) -> Report:
    """Quantize `model` into the folder `out`, and return the report.

        llmq.quantize("Qwen/Qwen3-8B", "out", method="gptq", bits=4, group_size=128, calibration="text.jsonl")
        llmq.quantize(model, "out", tokenizer=tokenizer, calibration=dataset["train"])

    `model` is a folder, a Hub id, a float .gguf file, or a float model in memory with its `tokenizer`. The settings are
    those of `llmq quantize --help`, by the same names; they override those of `config`. `calibration` also takes a list
    of texts, of chats (each a list of messages) or of token ids, or a `datasets.Dataset`. `stages` replace the stages
    of the method, for experiments. A bar shows the `progress` in a terminal or a notebook, and `on_event` is called
    with every event (see `llmq.report.events`). An interrupted call continues when it is repeated. Raises LlmqErrors.
    `report.further` has the reports of further grids, such as those of format="mlx,gguf:q4_k_m".
    """
    settings["calibration"], given = from_python(settings.get("calibration"))
    chosen = merged(config or QuantConfig(), settings)
    with opened(model, tokenizer, out) as (source, name), bar.shown(on_event, progress=progress) as report:
        runs = separate_grids.runs(str(source), chosen, out)
        jobs = jobs_of(
            runs, source, name, stages=stages, device=device, revision=revision, overwrite=overwrite,
            trust_remote_code=trust_remote_code, given=given,
        )  # fmt: skip
        return run_each(jobs, lambda number, job: job.run(report))


def jobs_of(runs: Sequence[GridRun], source: str | Path, name: str, **arguments: Any) -> list[Job]:
    """One job per run of a command. `arguments` are those of `Job`; reports call the model `name`."""
    jobs = [Job(source, run.out, run.settings, **arguments) for run in runs]
    for job, run in zip(jobs, runs, strict=True):
        job.report.source, job.report.notes = name, [*run.notes, *job.report.notes]
    return jobs


def run_each(jobs: list[Job], run: Callable[[int, Job], Report]) -> Report:
    """Run the jobs of a command with `run`, which gets the number of each; the first report has the others.

    A job that would be refused is refused before the first one starts. The list is emptied, so that no model of a
    finished job is kept.
    """
    written = 0
    for number, job in enumerate(jobs):
        if number:  # the first one does it when it starts
            job.require_possible(before=written)
        written += job.bytes_to_write
    reports = [run(number, jobs.pop(0)) for number in range(len(jobs))]
    reports[0].further = reports[1:]
    return reports[0]
