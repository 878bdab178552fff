"""`llmq eval PATH [--against ORIGINAL]`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.terminal import megabytes, print_json, print_notes, print_table, quiet_transformers
from llmq.errors import ConfigError

if TYPE_CHECKING:
    from llmq.evaluation.measure import Figures, Measurement, Size
    from llmq.evaluation.scoring import Evaluation

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"
LIMITS = "For scripts"

PANEL, ORDER = "Inspect", 1


def command(
    path: options.Path_,
    against: Annotated[str | None, Option("--against", help="The original model, to compare with.")] = None,
    text: Annotated[
        list[str] | None,
        Option(
            "--text",
            help="A text, as for --calibration: a file, or a Hub data set.  Repeatable.  Default: WikiText-2's.",
        ),
    ] = None,
    wikitext: Annotated[
        bool, Option("--wikitext", help="TEXT is WikiText's raw file: join its lines as the data set's rows.")
    ] = False,
    seqlen: Annotated[
        int | None, Option("--seqlen", min=2, help="Tokens in a window.  Default: 2048, or the context.")
    ] = None,
    windows: Annotated[
        int | None, Option("--windows", min=1, help="Stop after this many of each text.  Default: the whole text.")
    ] = None,
    max_kl: Annotated[
        float | None,
        Option(
            "--max-kl", min=0, help="Exit with 8 where the mean KL divergence on a text is higher.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        Option(
            "--max-ppl-increase", metavar="PERCENT",
            help="Exit with 8 where the perplexity on a text is higher than the original's by more: 2, or 2%.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure a model: perplexity; with --against also KL divergence and agreement with the original.

    Both are read block by block, so neither has to fit into memory.  Intervals hold 95 % of what other windows of the
    same texts would give.

    Example:  llmq eval out/ --against Qwen/Qwen3-8B --text held-out.txt --text code.jsonl --max-kl 0.02
    """
    increase = None if max_ppl_increase is None else per_cent(max_ppl_increase)
    if against is None and (max_kl is not None or increase is not None):
        raise ConfigError("limits on quality compare with an original, and none was given", hint="add --against")
    from llmq.evaluation.measure import measure, require

    quiet_transformers()
    result = measure(
        path,
        against,
        text or [WIKITEXT],
        wikitext=wikitext,
        seqlen=seqlen,
        limit=windows,
        device=device,
        remote_code=trust_remote_code,
    )
    if json:
        print_json(result.to_dict())
    else:
        _print(path, against, result)
    print_notes(result.notes)
    if against is not None:
        require(result, max_kl=max_kl, max_ppl_increase=increase)


def per_cent(text: str) -> float:
    """`2` and `2%` as 2.0."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise ConfigError(f"{text!r} is no percentage", hint="give a number such as 2 or 2%, not below 0")
    return value


def _print(path: str, against: str | None, result: "Measurement") -> None:
    sizes = [(path, result.size)]
    if against is not None and result.original_size is not None:
        sizes.insert(0, (against, result.original_size))
    print_table("", ("model", "size", "bits/weight"), [(name, *_size(size)) for name, size in sizes])
    shown = [*result.texts, result.total] if len(result.texts) > 1 else [result.total]
    rows = zip(*(_column(figures) for figures in shown), strict=True)
    labels = LABELS if result.original is not None else LABELS[:2]
    title = f"windows of {result.seqlen} tokens; in brackets, 95 % intervals"
    columns = ("", *(Path(figures.text).name for figures in shown))
    print_table(title, columns, [(label, *cells) for label, cells in zip(labels, rows, strict=False)])


LABELS = (
    "predicted tokens", "perplexity", "perplexity, original", "ratio",
    "KL mean", "KL median", "KL 99 %", "KL 99.9 %", "same top-1", "RMS Δp",
)  # fmt: skip


def _column(figures: "Figures") -> tuple[str, ...]:
    """What a text has for each of `LABELS`."""
    model = figures.model
    original: Evaluation | None = figures.original
    return (
        str(model.tokens),
        number(model.perplexity, ".4f", model.perplexity_interval),
        "-" if original is None else number(original.perplexity, ".4f", original.perplexity_interval),
        number(model.perplexity_ratio, ".4f", model.perplexity_ratio_interval),
        number(model.kl_mean, ".5f", model.kl_mean_interval),
        number(model.kl_median, ".5f"),
        number(model.kl_99, ".4f"),
        number(model.kl_999, ".4f"),
        number(model.same_top_1, ".2%", model.same_top_1_interval),
        number(model.rms_dp, ".2%", model.rms_dp_interval),
    )


def number(value: float | None, form: str, interval: tuple[float, float] | None = None) -> str:
    """A figure, and in brackets where it lies."""
    shown = "-" if value is None else format(value, form)
    return shown if interval is None else f"{shown} [{format(interval[0], form)}, {format(interval[1], form)}]"


def _size(size: "Size") -> tuple[str, str]:
    return megabytes(size.file_bytes), number(size.bits_per_weight, ".3f")
