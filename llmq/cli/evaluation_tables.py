"""The tables of `llmq eval`: sizes, metrics, floors, and differences between models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.cli.streams import print_text
from llmq.cli.terminal import print_table
from llmq.report.shown import megabytes

if TYPE_CHECKING:
    from llmq.evaluation.paired import PairedDifference
    from llmq.evaluation.results import Figures, Measurement, Size
    from llmq.evaluation.summary import Evaluation
    from llmq.evaluation.tasks import TaskScore
    from llmq.evaluation.trajectories import Trajectories

Columns = Sequence[tuple[str, Mapping[str, str]]]  # the title of a column, and its cells by label


def print_evaluation(
    measured: Mapping[str, "Measurement"], against: str | None, differences: Sequence["PairedDifference"]
) -> None:
    """Print the results: one model with a column per text, several models with a table per text."""
    first = next(iter(measured.values()))
    sizes = [(path, result.size) for path, result in measured.items()]
    if against is not None and first.original_size is not None:
        sizes.insert(0, (against, first.original_size))
    print_table("", ("model", "size", "bits/weight"), [(name, *_size(size)) for name, size in sizes])
    inputs = "" if first.activations == "none" else f"; inputs in {first.activations}"
    title = f"sequences of {first.seqlen} tokens{inputs}; 95 % intervals in brackets"
    if len(measured) == 1:
        _print_columns(title, [(_short(figures), _cells(figures, first)) for figures in _shown(first)])
    else:
        for row in zip(*(_shown(result) for result in measured.values()), strict=True):
            columns = [
                (name, _cells(figures, result)) for figures, (name, result) in zip(row, measured.items(), strict=True)
            ]
            _print_columns(f"{_short(row[0])}, {title}", columns)
    _print_floors(first)
    _print_differences(differences)
    for name, result in measured.items():
        _print_text(name if len(measured) > 1 else "", result)


def number(value: float | None, form: str, interval: tuple[float, float] | None = None) -> str:
    """A number, with its interval in brackets."""
    shown = "-" if value is None else format(value, form)
    return shown if interval is None else f"{shown} [{format(interval[0], form)}, {format(interval[1], form)}]"


def _shown(result: "Measurement") -> "list[Figures]":
    """The metrics of each text, and of all texts together if there are several."""
    return [*result.texts, result.total] if len(result.texts) > 1 else [result.texts[0]]


def _short(figures: "Figures") -> str:
    return Path(figures.text).name


def _print_columns(title: str, columns: Columns) -> None:
    """Print the labels that have a value in some column."""
    labels = [label for label in columns[0][1] if any(cells[label] != "-" for _, cells in columns)]
    rows = [(label, *(cells[label] for _, cells in columns)) for label in labels]
    print_table(title, ("", *(name for name, _ in columns)), rows)


def _cells(figures: "Figures", result: "Measurement") -> dict[str, str]:
    model = figures.model
    original: Evaluation | None = figures.original
    whole = figures is result.total or len(result.texts) == 1
    return {
        "documents": "-" if figures.documents is None else str(figures.documents),
        "predicted tokens": str(model.tokens),
        "perplexity": number(model.perplexity, ".4f", model.perplexity_interval),
        "perplexity, original": "-"
        if original is None
        else number(original.perplexity, ".4f", original.perplexity_interval),
        "ratio": number(model.perplexity_ratio, ".4f", model.perplexity_ratio_interval),
        "KL mean": number(model.kl_mean, ".5f", model.kl_mean_interval),
        "KL median": number(model.kl_median, ".5f"),
        "KL 99 %": number(model.kl_99, ".4f"),
        "KL 99.9 %": number(model.kl_999, ".4f"),
        "KL maximum": number(model.kl_max, ".4f"),
        "same top-1": number(model.same_top_1, ".2%", model.same_top_1_interval),
        "RMS Δp": number(model.rms_dp, ".2%", model.rms_dp_interval),
        "overlap with calibration": _overlap(figures, result),
        **(_trajectories(result.trajectories) if whole else dict.fromkeys(_trajectories(None), "-")),
    }


def _overlap(figures: "Figures", result: "Measurement") -> str:
    """The share of 13-grams; a lower bound if a part of the calibration text is not known."""
    at_least = "≥ " if result.calibration.unknown and figures.overlap is not None else ""
    return at_least + number(figures.overlap, ".2%")


def _trajectories(compared: "Trajectories | None") -> dict[str, str]:
    if compared is None:
        return {"same trajectories": "-", "first difference": "-"}
    position = "none" if compared.first_difference is None else f"token {compared.first_difference:.1f}"
    share = number(compared.same, ".1%", compared.same_interval)
    return {"same trajectories": f"{share} of {compared.prompts}", "first difference": position}


def _print_floors(result: "Measurement") -> None:
    """Print the distance of the original from itself, on each text and on all together."""
    if not result.floors:
        return
    rows = []
    for floor in result.floors:
        shown = [*floor.texts, floor.total] if len(floor.texts) > 1 else [floor.total]
        for figures in shown:
            model = figures.model
            same = "-" if floor.trajectories is None or figures is not floor.total else f"{floor.trajectories.same:.1%}"
            rows.append(
                (
                    floor.name if figures is shown[0] else "",
                    _short(figures),
                    number(model.kl_mean, ".2e"),
                    number(model.kl_99, ".2e"),
                    number(model.kl_max, ".2e"),
                    number(model.same_top_1, ".2%"),
                    same,
                )
            )
    print_table(
        "floors: the original compared with itself, computed in another way",
        ("", "text", "KL mean", "KL 99 %", "KL maximum", "same top-1", "same trajectories"),
        rows,
    )


def _print_differences(differences: Sequence["PairedDifference"]) -> None:
    """Print each pair of models on all texts together; of two models also each text."""
    pairs = {(difference.first, difference.second) for difference in differences}
    last = {(difference.first, difference.second): difference for difference in differences}
    shown = differences if len(pairs) == 1 else list(last.values())
    if not shown:
        return
    rows = [
        (
            f"{difference.second} - {difference.first}",
            Path(difference.text).name,
            number(difference.difference, "+.5f", difference.interval),
            number(difference.ratio, ".3f", difference.ratio_interval),
            f"{difference.lower} of {difference.documents} {difference.unit}",
            "yes" if difference.is_resolved else "no",
        )
        for difference in shown
    ]
    columns = ("", "text", "KL mean, difference", "ratio", "lower on", "interval excludes 0")
    print_table("paired differences: the second model minus the first, on the same documents", columns, rows)


def _print_text(name: str, result: "Measurement") -> None:
    """Print the worst text, and the calibration text that the overlap is about."""
    start = f"{name}: " if name else ""
    worst = result.worst
    if worst is not None:
        model = worst.model
        print_text(f"{start}worst text: {worst.text}, KL mean {number(model.kl_mean, '.5f', model.kl_mean_interval)}")
    if result.original is not None:
        print_text(f"{start}calibration text: {result.calibration}")


def _size(size: "Size") -> tuple[str, str]:
    return megabytes(size.file_bytes), number(size.bits_per_weight, ".3f")


def print_tasks(scores: "Mapping[str, Sequence[TaskScore]]", against: str | None) -> None:
    """One row per metric and model, with the difference from the original in the same units."""
    from llmq.evaluation.tasks import difference

    originals = {} if against is None else {(score.task, score.metric): score for score in scores[against]}
    rows = []
    for path, own in scores.items():
        for score in own:
            original = originals.get((score.task, score.metric))
            gap = "-"
            if original is not None and path != against:
                change, error = difference(score, original)
                gap = f"{change:+.4f}" + ("" if error is None else f" ± {error:.4f}")
            value = f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}")
            rows.append((score.task, score.metric, path, value, gap))
    rows.sort(key=lambda row: row[:2])  # models below each other, in their order
    columns = ("task", "metric", "model", "value ± standard error", "difference from the original")
    print_table("tasks of lm-eval", columns, rows)
