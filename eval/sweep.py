"""Measure methods x bits x group sizes x draws of calibration text; writes sweep.json, sweep.md and pareto.png.

    python eval/sweep.py                             the bundled model; about twenty minutes on one core
    python eval/sweep.py --methods gptq fast --bits 4 --group-sizes 32 64 128 --zeros symmetric asymmetric
    python eval/sweep.py --models babyllama-tok361-pad384
    python eval/sweep.py --models FOLDER --calibration FILE --text FILE
    python eval/sweep.py --render                    only the table and the picture, from sweep.json

Files are in eval/results/. Finished rows are written at once, and existing rows are not measured again, so a killed run
continues. Delete rows, or the file, to measure them again. Calibration and evaluation text are those of
eval/subjects.py; KL is KL(float ‖ quantized) in nats per token, of the written file. rtn needs no text, so it has one
draw.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llmq
from llmq.cli.terminal import quiet_transformers
from llmq.config import parse_number
from llmq.evaluation.measure import measure
from llmq.methods import METHODS
from llmq.numerics.scheme import BITS, GroupSize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "eval"))
from rows import Row, append, read  # noqa: E402
from subjects import MODELS, SAMPLES, SEQLEN, WINDOWS, stamp, table_row, texts  # noqa: E402

JSON, MARKDOWN, PICTURE = (ROOT / "eval" / "results" / name for name in ("sweep.json", "sweep.md", "pareto.png"))
DEFAULT_METHODS = ("rtn", "gptq", "fast", "balanced", "best")
SLOW = ("best",)  # without --methods, only at 4 bits and for the first draw
ZEROS = ("symmetric", "asymmetric")


@dataclass(frozen=True)
class Case:
    """One run: the settings that identify its row."""

    model: str
    method: str
    bits: int
    group_size: GroupSize
    symmetric: bool
    seed: int

    def is_of(self, row: Row) -> bool:
        return all(row[key] == value for key, value in asdict(self).items())


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The requested runs, one draw after the other, so that a first picture is available early."""
    sizes = [parse_number(size) for size in arguments.group_sizes]
    methods = arguments.methods or [method for method in DEFAULT_METHODS if method in METHODS]
    grids = itertools.product(arguments.bits, sizes, [zeros == "symmetric" for zeros in arguments.zeros])
    for seed, model, (bits, size, symmetric), method in itertools.product(
        range(arguments.seeds), arguments.models, list(grids), methods
    ):
        left_out = arguments.methods is None and method in SLOW and (bits != 4 or seed > 0)
        if not left_out and (seed == 0 or METHODS[method].needs_calibration):
            yield Case(model, method, bits, size, symmetric, seed)


def run(case: Case, folder: Path, calibration: Path, evaluation: Path) -> Row:
    """Quantize and measure."""
    with tempfile.TemporaryDirectory() as scratch:
        report = llmq.quantize(
            str(folder), Path(scratch) / "out", calibration=[str(calibration)], samples=SAMPLES, seqlen=SEQLEN,
            **{key: value for key, value in asdict(case).items() if key != "model"},
        )  # fmt: skip
        measurement = measure(Path(scratch) / "out", folder, str(evaluation), seqlen=SEQLEN, limit=WINDOWS)
    assert measurement.original is not None, "measured against the original"
    figures = ("kl_mean", "kl_mean_interval", "kl_99", "perplexity", "perplexity_ratio", "same_top_1")
    return {
        **asdict(case), "bits_per_weight": report.bits_per_weight, "seconds": report.seconds,
        **{name: getattr(measurement.model, name) for name in figures},
        "float_perplexity": measurement.original.perplexity, "tokens": measurement.model.tokens, "measured": stamp(),
    }  # fmt: skip


def sweep(arguments: argparse.Namespace) -> None:
    wanted = list(cases(arguments))
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(wanted, start=1):
            if any(case.is_of(row) for row in read(JSON)):  # read again each time, because another sweep may be running
                continue
            folder = MODELS[case.model] if case.model in MODELS else Path(case.model)
            if not folder.is_dir():
                print(f"{case.model} is not available, skipped", file=sys.stderr)
                continue
            if case.model in MODELS:
                calibration, evaluation = texts(case.model, Path(scratch))
            else:
                calibration, evaluation = arguments.calibration, arguments.text
            row = run(case, folder, calibration, evaluation)
            append(JSON, row)
            print(f"{number}/{len(wanted)}", *asdict(case).values(), f"KL {row['kl_mean']:.5f}", flush=True)


@dataclass(frozen=True)
class Point:
    """All draws of one case."""

    model: str
    method: str
    bits: int
    group_size: GroupSize
    symmetric: bool
    rows: tuple[Row, ...]

    def mean(self, figure: str) -> float:
        return sum(float(row[figure]) for row in self.rows) / len(self.rows)

    @property
    def kl(self) -> tuple[float, float, float]:
        """The mean, the minimum and the maximum."""
        values = [float(row["kl_mean"]) for row in self.rows]
        return self.mean("kl_mean"), min(values), max(values)

    @property
    def grid(self) -> tuple[str, int, GroupSize, bool]:
        return self.model, self.bits, self.group_size, self.symmetric


def points(measured: Sequence[Row]) -> list[Point]:
    """The points by model, grid and method, in the order of METHODS."""
    by_case: dict[tuple[Any, ...], list[Row]] = {}
    for row in measured:
        by_case.setdefault(
            tuple(row[key] for key in ("model", "method", "bits", "group_size", "symmetric")), []
        ).append(row)
    order = list(METHODS)
    listed = [Point(*key, tuple(sorted(own, key=lambda row: row["seed"]))) for key, own in by_case.items()]
    return sorted(listed, key=lambda p: (p.model, -p.bits, str(p.group_size), not p.symmetric, order.index(p.method)))


def front(candidates: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both bits and KL, by bits."""
    best: list[Point] = []
    for point in sorted(candidates, key=lambda point: (point.mean("bits_per_weight"), point.kl[0])):
        if not best or point.kl[0] < best[-1].kl[0]:
            best.append(point)
    return best


INTRODUCTION = """# Methods, bits and groups

Generated by `python eval/sweep.py`; the figures are in [sweep.json](sweep.json).
{samples} x {seqlen} calibration tokens, {windows} x {seqlen} held-out tokens.  KL is KL(float ‖ quantized) in nats
per token, measured on the file read back: the mean over draws of the calibration text, and in brackets the lowest
and the highest.  Bits include scales and zero points.

![KL against bits per weight](pareto.png)
"""
COLUMNS = ("bits", "group", "grid", "method", "draws", "bits/weight", "KL mean", "KL / RTN", "perplexity ratio",
           "same top-1", "seconds")  # fmt: skip


def render(measured: Sequence[Row]) -> str:
    """results/sweep.md."""
    parts = [INTRODUCTION.format(samples=SAMPLES, seqlen=SEQLEN, windows=WINDOWS)]
    all_points = points(measured)
    for model in dict.fromkeys(point.model for point in all_points):
        own = [point for point in all_points if point.model == model]
        parts.append(f"\n## {model}\n\nfloat perplexity {own[0].rows[0]['float_perplexity']:.4f}\n")
        parts += [table_row(COLUMNS), table_row("---" for _ in COLUMNS)]
        parts += [table_row(cells(point, own)) for point in own]
        last = max((row["measured"] for point in own for row in point.rows), key=lambda stamp: stamp["date"])
        parts.append("\nMeasured until {date} at {commit}: {hardware}, torch {torch}.".format(**last))
    return "\n".join(parts) + "\n"


def cells(point: Point, others: Sequence[Point]) -> Iterator[str]:
    mean, lowest, highest = point.kl
    rtn = next((p for p in others if p.method == "rtn" and p.grid == point.grid), None)
    yield str(point.bits)
    yield str(point.group_size)
    yield ZEROS[not point.symmetric]
    yield point.method
    yield str(len(point.rows))
    yield f"{point.mean('bits_per_weight'):.3f}"
    yield f"{mean:.5f}" + (f" [{lowest:.5f}, {highest:.5f}]" if len(point.rows) > 1 else "")
    yield "-" if rtn is None else f"{mean / rtn.kl[0]:.0%}"
    yield f"{point.mean('perplexity_ratio'):.4f}"
    yield f"{point.mean('same_top_1'):.2%}"
    yield f"{point.mean('seconds'):.1f}"


def draw(measured: Sequence[Row], file: Path) -> None:
    """Draw a panel per model and a line per method: its front. Bars are ranges over draws, hollow points asymmetric."""
    from matplotlib.figure import Figure

    all_points = points(measured)
    models = list(dict.fromkeys(point.model for point in all_points))
    figure = Figure(figsize=(5.2 * len(models) + 0.4, 4.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = [point for point in all_points if point.model == model]
        for number, method in enumerate(METHODS):
            of_method = [point for point in own if point.method == method]
            if not of_method:
                continue
            colour = "0.55" if method == "rtn" else f"C{number}"
            line = front(of_method)
            x, y = [p.mean("bits_per_weight") for p in line], [p.kl[0] for p in line]
            axes.plot(x, y, color=colour, linewidth=1.2, label=method)
            for point in of_method:
                mean, lowest, highest = point.kl
                axes.errorbar(
                    point.mean("bits_per_weight"), mean, [[mean - lowest], [highest - mean]], fmt="o", markersize=4,
                    color=colour, markerfacecolor=colour if point.symmetric else "white", capsize=2, linewidth=1,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight, with scales")
        axes.set_ylabel("KL to the float model, nats per token")
        axes.set_title(f"{model}  (float: KL 0, perplexity {own[0].rows[0]['float_perplexity']:.3f})", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=100, metadata={"Software": None})


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-python-llama"], help=f"folders, or {', '.join(MODELS)}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help=f"default: {', '.join(DEFAULT_METHODS)}")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3], choices=BITS)
    parser.add_argument("--group-sizes", nargs="+", default=["128", "32"])
    parser.add_argument("--zeros", nargs="+", default=["symmetric"], choices=ZEROS)
    parser.add_argument("--seeds", type=int, default=2, help="number of draws of the calibration text")
    parser.add_argument("--calibration", type=Path, help="the calibration text for models given as folders")
    parser.add_argument("--text", type=Path, help="the evaluation text for models given as folders")
    parser.add_argument("--render", action="store_true", help="only write the table and the picture")
    options = parser.parse_args(arguments)
    if not set(options.models) <= set(MODELS) and not (options.calibration and options.text):
        parser.error("models given as folders need --calibration and --text")
    return options


def main() -> None:
    arguments = parsed()
    quiet_transformers()
    if not arguments.render:
        sweep(arguments)
    done = read(JSON)
    MARKDOWN.write_text(render(done), encoding="utf-8")
    draw(done, PICTURE)


if __name__ == "__main__":
    main()
