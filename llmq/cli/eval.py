"""`llmq eval PATH… [--against ORIGINAL]`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.progress import ProgressDisplay
from llmq.cli.terminal import megabytes, print_json, print_notes, print_table, quiet_transformers
from llmq.errors import ConfigError

if TYPE_CHECKING:
    from llmq.evaluation.measure import Figures, Measurement, Size
    from llmq.evaluation.scoring import Evaluation

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"
LIMITS = "Limits for scripts"
MaxKl = Annotated[
    float | None,
    Option(
        "--max-kl", min=0, help="Exit code 8 if the mean KL divergence on any text is higher.", rich_help_panel=LIMITS
    ),
]
MaxPplIncrease = Annotated[
    str | None,
    Option(
        "--max-ppl-increase", metavar="PERCENT", rich_help_panel=LIMITS,
        help="Exit code 8 if the perplexity on any text exceeds the original's by more, such as 2 or 2%.",
    ),
]  # fmt: skip


Activations = Annotated[
    str,
    Option(
        "--activations",
        metavar="none|int8",
        help="Quantize the inputs of the quantized linear layers (of a float model: of all linear layers) to 8 bits, "
        "dynamically per token, as W8A8 and W4A8 engines do.",
    ),
]

PANEL, ORDER = "Inspect", 1


def command(
    paths: options.Paths,
    against: Annotated[str | None, Option("--against", help="The original model to compare with.")] = None,
    text: Annotated[
        list[str] | None,
        Option(
            "--text",
            help="Evaluation text: a file or a Hub dataset, as for --calibration. Repeatable. Default: the test split "
            "of WikiText-2.",
        ),
    ] = None,
    wikitext: Annotated[
        bool, Option("--wikitext", help="The text is the raw file of WikiText: join its lines as the dataset does.")
    ] = False,
    seqlen: Annotated[
        int | None, Option("--seqlen", min=2, help="Tokens per sequence. Default: 2048, or the model's context.")
    ] = None,
    windows: Annotated[
        int | None, Option("--windows", min=1, help="Evaluate only the first sequences of each text. Default: all.")
    ] = None,
    activations: Activations = "none",
    max_kl: MaxKl = None,
    max_ppl_increase: MaxPplIncrease = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure models: perplexity; with --against also KL divergence.

    All models are read block by block, so none has to fit into memory.
    Brackets hold 95 % bootstrap intervals over sequences.

    Examples:
      llmq eval out/ --against Qwen/Qwen3-8B
      llmq eval out/ --against Qwen/Qwen3-8B --text held-out.txt --max-kl 0.02
      llmq eval out-4bit/ out-3bit/ --against Qwen/Qwen3-8B

    Exit codes:
      0  success                   5  unusable text
      2  invalid options           6  device not available
      3  unreadable model          8  worse than --max-kl or
      4  unsupported model            --max-ppl-increase allow

    See also:
      llmq sensitivity  which layers cause the loss
    """
    increase = None if max_ppl_increase is None else per_cent(max_ppl_increase)
    if against is None and (max_kl is not None or increase is not None):
        raise ConfigError("--max-kl and --max-ppl-increase need an original model", hint="add --against")
    from llmq.evaluation.measure import measure_many, require

    quiet_transformers()
    models = list(dict.fromkeys(paths))
    with ProgressDisplay() as display:
        results = measure_many(
            against,
            models,
            text or [WIKITEXT],
            wikitext=wikitext,
            seqlen=seqlen,
            limit=windows,
            device=device,
            remote_code=trust_remote_code,
            activations=activations,
            on_event=display,
        )
    measured = dict(zip(models, results, strict=True))
    if not json:
        _print(measured, against)
    elif len(results) == 1:
        print_json(results[0].to_dict())
    else:
        print_json({"models": [{"path": path, **result.to_dict()} for path, result in measured.items()]})
    print_notes(dict.fromkeys(note for result in results for note in result.notes))
    if against is not None:
        require(measured, max_kl=max_kl, max_ppl_increase=increase)


def per_cent(text: str) -> float:
    """`2` and `2%` as 2.0."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise ConfigError(f"{text!r} is not a percentage", hint="give a number of at least 0, such as 2 or 2%")
    return value


def _print(measured: dict[str, "Measurement"], against: str | None) -> None:
    """Print sizes and metrics: one model with a column per text, several models with a table per text."""
    first = next(iter(measured.values()))
    sizes = [(path, result.size) for path, result in measured.items()]
    if against is not None and first.original_size is not None:
        sizes.insert(0, (against, first.original_size))
    print_table("", ("model", "size", "bits/weight"), [(name, *_size(size)) for name, size in sizes])
    inputs = "" if first.activations == "none" else f"; inputs in {first.activations}, dynamic per token"
    title = f"sequences of {first.seqlen} tokens{inputs}; 95 % intervals in brackets"
    if len(measured) == 1:
        tables = [(title, [(Path(figures.text).name, figures) for figures in _shown(first)])]
    else:
        by_text = zip(*(_shown(result) for result in measured.values()), strict=True)
        tables = [(f"{Path(row[0].text).name}, {title}", list(zip(measured, row, strict=True))) for row in by_text]
    labels = LABELS if against is not None else LABELS[:2]
    for caption, columns in tables:
        rows = zip(*(_column(figures) for _, figures in columns), strict=True)
        names = [name for name, _ in columns]
        print_table(caption, ("", *names), [(label, *cells) for label, cells in zip(labels, rows, strict=False)])


def _shown(result: "Measurement") -> "list[Figures]":
    """The metrics of each text, and of all texts together if there are several."""
    return [*result.texts, result.total] if len(result.texts) > 1 else [result.total]


LABELS = (
    "predicted tokens", "perplexity", "perplexity, original", "ratio",
    "KL mean", "KL median", "KL 99 %", "KL 99.9 %", "same top-1", "RMS Δp",
)  # fmt: skip


def _column(figures: "Figures") -> tuple[str, ...]:
    """The cells of a text, one per label in `LABELS`."""
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
    """A number, with its interval in brackets."""
    shown = "-" if value is None else format(value, form)
    return shown if interval is None else f"{shown} [{format(interval[0], form)}, {format(interval[1], form)}]"


def _size(size: "Size") -> tuple[str, str]:
    return megabytes(size.file_bytes), number(size.bits_per_weight, ".3f")
