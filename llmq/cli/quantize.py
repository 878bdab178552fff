"""`llmq quantize MODEL [OUT]`"""

import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Exit

from llmq.checkpoint import PAGE_FILES
from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.planned import print_plans
from llmq.cli.progress import ProgressDisplay
from llmq.cli.setting_options import with_settings
from llmq.cli.streams import print_text
from llmq.cli.terminal import (
    print_done,
    print_json,
    print_notes,
    print_table,
    quiet_transformers,
)
from llmq.cli.verdict import next_command, print_verdict, require, require_measurable
from llmq.config import QuantConfig
from llmq.errors import Interrupted, LlmqError
from llmq.report import expert_tokens
from llmq.report.record import OUTSIDE_THE_BLOCKS, Report
from llmq.report.shown import megabytes
from llmq.setting_fields import config_to

if TYPE_CHECKING:
    from llmq.distributed.ranks import Ranks
    from llmq.job import Job
    from llmq.steps.separate_grids import GridRun

LAYERS_SHOWN = 6

PANEL, ORDER = "Quantization", 1


@with_settings()
def command(
    model: options.Model,
    out: options.Out = None,
    *,
    settings: QuantConfig,
    print_config: options.PrintConfig = False,
    device: options.Device = "auto",
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    max_kl: options.MaxKl = None,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:
    """Quantize a model to 4 bits (or 2, 3 or 8), one block at a time.

    The defaults are a good start: 4 bits, groups of 128, method balanced,
    calibrated on a mixed set of text from the Hub.

    An interrupted run continues when the same command is given again; after
    the end, the same command reports that it has finished already.
    The model appears in OUT when it is complete, with report.html; before,
    OUT/.llmq-partial/report.html shows the state of the run.
    `torchrun --nproc-per-node 4 -m llmq quantize …` uses four GPUs.

    Examples:
      llmq quantize Qwen/Qwen3-8B out/ --calibration text.jsonl
      llmq quantize Qwen/Qwen3-8B --method gptq --format gptq --dry-run
      llmq quantize Qwen/Qwen3-8B --target-bits 4.5 --skip lm_head
      llmq quantize Qwen/Qwen3-30B-A3B --preset moe --dry-run
      llmq quantize Qwen/Qwen3-8B --bits 3 --print-config > llmq.toml
      llmq quantize Qwen/Qwen3-8B out/ --format mlx,gguf:q4_k_m

    Exit codes:
      0  success                   5    unusable calibration text
      2  invalid settings          6    device not available
      3  unreadable model          7    output cannot be written
      4  unsupported model         8    worse than --max-kl allows
                                   130  interrupted

    See also:
      llmq sensitivity  which layers need more bits
      llmq eval         how much quality was lost
      llmq verify       which engines load the result
    """
    if print_config:
        import tomli_w

        print_text(tomli_w.dumps(config_to(settings)), end="")
        return
    require_measurable(settings, max_kl)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of each connection that a process closes
    begin(model, quiet=quiet)
    from llmq._quantize import jobs_of, run_each
    from llmq.distributed import join
    from llmq.export.model_of_run import opened
    from llmq.steps import separate_grids

    quiet_transformers()
    with reported_once(join(device)) as ranks, opened(model, None, out, processes=ranks.size) as (source, name):
        runs = separate_grids.runs(str(source), settings, out, processes=ranks.size)
        jobs = jobs_of(
            runs, source, name, device=device, revision=revision, overwrite=overwrite,
            trust_remote_code=trust_remote_code, ranks=ranks,
        )  # fmt: skip
        if dry_run:
            if ranks.is_first:
                print_plans(jobs, runs, as_json=json)
            return

        def shown(number: int, job: "Job") -> Report:
            if ranks.is_first:
                _print_start(job, runs, number)
            job.report.command = shlex.join(["llmq", *sys.argv[1:]])
            log = log_json if ranks.is_first else None
            with ProgressDisplay(silent=quiet or not ranks.is_first, log=log, append=number > 0) as display:
                report = job.run(display)
            if ranks.is_first:
                _print_result(job, shown=runs[number].notes, as_json=json, quiet=quiet)
            return report

        report = run_each(jobs, shown)
        if ranks.is_first:
            if json:
                print_json(report.to_dict())
            for made in (report, *report.further):
                require(made.verdict, max_kl, Path(made.output))


@contextmanager
def reported_once(ranks: "Ranks") -> Iterator["Ranks"]:
    """Several processes print an error that all of them have only once; Ctrl-C and SIGTERM are errors, too.

    Only the first process prints warnings.
    """
    if not ranks.is_first:
        warnings.simplefilter("ignore")
    try:
        try:
            yield ranks
        except KeyboardInterrupt:
            hint = "repeat the command: it continues after the last finished block"
            stopped = "interrupted" if ranks.size == 1 else "interrupted, or another process of this run has ended"
            raise Interrupted(stopped, hint=hint) from None
    except LlmqError as error:
        if ranks.reports("interrupted" if isinstance(error, Interrupted) else str(error)):
            raise
        raise Exit(error.exit_code) from None


def _print_start(job: "Job", runs: "Sequence[GridRun]", number: int) -> None:
    """Print what a run begins with: its number among several, and notes about the settings and existing grids."""
    if len(runs) > 1:
        print_notes([f"run {number + 1} of {len(runs)}: {', '.join(job.plan.settings.formats)} → {job.out}"])
    print_notes([*runs[number].notes, *job.plan.grid_notes])


def _print_serving(job: "Job") -> None:
    """Print in short which engines load the finished model; `llmq verify` has the details."""
    from llmq.verification import engines

    several = len(job.plan.settings.formats) > 1
    rows, following, pages = [], list[str](), list[str]()
    for name in job.plan.settings.formats:
        folder = job.out / name if several else job.out
        verdicts = engines.verdicts(engines.check(folder))
        vllm = any(v.engine == "vLLM" and v.loads for v in verdicts)
        pages.append(str(folder / PAGE_FILES[0]))
        following.append(next_command(folder, name, vllm=vllm))
        loading = [f"{v.engine} ({', '.join(map(str, v.gpus))} GPUs)" for v in verdicts if v.loads and len(v.gpus) > 1]
        loading += [v.engine for v in verdicts if v.loads and len(v.gpus) == 1]
        rows.append((name, ", ".join(loading) or "no engine"))
    print_table("compatible engines", ("format", "engines (llmq verify has the reasons)"), rows)
    print_text(f"report: {', '.join(pages)}")
    first = job.out / job.plan.settings.formats[0] if several else job.out
    following.append(shlex.join(["llmq", "eval", str(first), "--against", job.report.source]))
    print_text("next:")
    for line in following:
        print_text(f"  {line}")


def _print_result(job: "Job", *, shown: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Print the result of a run. `shown` are notes that were printed before; as JSON, nothing goes to stdout yet."""
    report, shown = job.report, [*shown, *job.plan.grid_notes]
    if not (quiet or job.finished):
        shown += (report.calibration or {}).get("notes", ())  # those with the manifest of the text
    notes = [note for note in report.notes if note not in shown]
    notes += report.tuning.notes if report.tuning else ()
    measuring = 0.0 if report.verdict is None else report.verdict.seconds
    print_notes([*notes, *(note for block in report.blocks for note in block.notes), *_layer_notes(job)])
    if job.finished:
        print_done("finished already:", f" {job.out}")
    else:
        print_done("done", f" in {report.seconds + measuring:.1f} s: {job.out}")
    if as_json:
        return
    worst = sorted(report.layers, key=lambda layer: -layer.error)[:LAYERS_SHOWN]
    rows = [
        (layer.name, layer.scheme, f"{layer.error:.2%}", "-" if layer.rtn_error is None else f"{layer.rtn_error:.2%}")
        for layer in worst
    ]
    print_table("layers with the largest error", ("layer", "grid", "error", "round to nearest"), rows)
    _print_experts(report)
    summary = [
        ("layers quantized", str(len(report.layers))),
        ("bits per weight, with scales", f"{report.bits_per_weight:.3f}"),
        ("size of weights", f"{megabytes(report.original_bytes)} → {megabytes(report.file_bytes)}"),
        *((f"size as {name}", megabytes(size)) for name, size in report.sizes.items()),
        *((summary.stage, summary.outcome) for summary in report.stages),
        *([("tuning", str(report.tuning))] if report.tuning else []),
        *([("experts", experts)] if (experts := expert_tokens.summary(report.experts)) else []),
        ("time", f"{report.seconds:.1f} s" + (f", and {measuring:.1f} s to measure the quality" if measuring else "")),
        ("peak memory", megabytes(report.peak_memory_bytes)),
        ("output", str(job.out)),
    ]
    print_table("result", ("", "value"), summary)
    print_verdict(report.verdict)
    try:
        _print_serving(job)
    except LlmqError as error:
        print_notes([f"compatible engines could not be determined: {error}"])


def _print_experts(report: Report) -> None:
    """Print the calibration tokens per expert, of the layers whose experts saw the fewest."""
    fewest = sorted(report.experts, key=lambda entry: (entry.minimum, entry.median))[:LAYERS_SHOWN]
    rows = [
        (
            entry.layer,
            str(entry.experts),
            str(entry.minimum),
            f"{entry.median:g}",
            str(entry.maximum),
            str(entry.under_sampled),
        )
        for entry in fewest
    ]
    if rows:
        columns = ("layer", "experts", "minimum", "median", "maximum", "under-sampled")
        print_table("calibration tokens per expert", columns, rows)


def _layer_notes(job: "Job") -> list[str]:
    """Notes about layers, one line for all layers with the same note."""
    noted = [
        (f"kept in float, {reason}", name) for name, reason in job.report.left.items() if reason != OUTSIDE_THE_BLOCKS
    ]
    noted += [(plan.reason, plan.name) for plan in job.plan.layers.values() if plan.scheme.weights and plan.reason]
    noted += [(note, layer.name) for layer in job.report.layers for note in layer.notes]
    by_note: dict[str, list[str]] = {}
    for note, name in noted:
        by_note.setdefault(note, []).append(name)
    return [
        f"{note}: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}" for note, names in by_note.items()
    ]
