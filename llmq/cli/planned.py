"""What `llmq quantize --dry-run` prints: the grid of each layer, the engines and the size."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmq.cli.streams import print_text
from llmq.cli.terminal import print_json, print_notes, print_table
from llmq.cli.verify import print_findings, print_serving
from llmq.report.shown import megabytes

if TYPE_CHECKING:
    from llmq.job import Job
    from llmq.steps.separate_grids import GridRun


def print_plans(jobs: "Sequence[Job]", runs: "Sequence[GridRun]", *, as_json: bool) -> None:
    """Print the plan of each run. As JSON, that of the first one has the others under `further`."""
    if as_json:
        first, *others = [_plan_values(job) for job in jobs]
        print_json({**first, "further": others} if others else first)
        return
    for job, run in zip(jobs, runs, strict=True):
        print_notes(run.notes)
        _print_plan(job)


def _plan_values(job: "Job") -> dict[str, Any]:
    grids = job.plan.existing_grids
    layers = [
        {
            "name": plan.name,
            "shape": [plan.out_features, plan.in_features],
            "scheme": str(plan.scheme) if plan.scheme.weights else None,
            "reason": plan.reason,
            "existing_grid": grids[path].outcome if path in grids else None,
        }
        for path, plan in job.plan.layers.items()
    ]
    from llmq.verification import engines
    from llmq.verification.engines.planned_run import planned

    findings = {name: engines.judge(subject) for name, subject in planned(job.plan).items()}
    return {
        "output": str(job.out), "bytes": job.plan.expected_bytes, "layers": layers, "left": job.report.left,
        "notes": job.report.notes,
        "serving": {name: [finding.to_dict() for finding in own] for name, own in findings.items()},
    }  # fmt: skip


def _print_plan(job: "Job") -> None:
    plans, grids = job.plan.layers.values(), job.plan.existing_grids
    rows = _merged(
        [
            (
                p.name,
                f"{p.out_features} x {p.in_features}",
                str(p.scheme if p.scheme.weights else "-"),
                "; ".join(filter(None, (p.reason, grids[path].outcome if path in grids else ""))),
            )
            for path, p in job.plan.layers.items()
        ]
    )
    print_table(f"plan: {job.report.source} → {job.out}", ("layer", "number", "shape", "grid", "note"), rows)
    outside = [name for name in job.report.left if name not in {plan.name for plan in plans}]
    print_text(f"kept in float: {', '.join(outside) or 'nothing else'}")
    for note in job.plan.notes:
        print_text(note)
    if job.plan.settings.target_bits is not None:
        print_text("--target-bits changes the grids of layers after measuring them: see llmq sensitivity")
    print_notes(job.plan.grid_notes)
    _print_planned_serving(job)
    print_text(f"size of weights: {megabytes(job.report.original_bytes)} → about {megabytes(job.plan.expected_bytes)}")


def _merged(rows: list[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str, str]]:
    """One row for all layers that differ only in the number of their block or expert, with how many these are."""
    numbered = Counter((re.sub(r"\.\d+(?=\.)", ".*", name), *rest) for name, *rest in rows)
    return [(name, str(number), shape, grid, note) for (name, shape, grid, note), number in numbered.items()]


def _print_planned_serving(job: "Job") -> None:
    """Print which engines would load each planned format, and why not."""
    from llmq.verification import engines
    from llmq.verification.engines.planned_run import planned

    for name, subject in planned(job.plan).items():
        findings = engines.judge(subject)
        print_serving(engines.verdicts(findings), f"compatible engines for {name}")
        print_findings([finding for finding in findings if finding.in_the_way or finding.gpus], sources=False)
