"""`llmq eval PATH [--against ORIGINAL]`"""

from typing import Annotated, Any

from typer import Option

from llmq.cli import options
from llmq.cli.terminal import megabytes, print_json, print_table, quiet_transformers

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"


def command(
    path: options.Path_,
    against: Annotated[str | None, Option("--against", help="The original model, to compare with.")] = None,
    text: Annotated[
        str, Option("--text", help="A .txt, .jsonl, .json or .parquet file, or a Hub data set.")
    ] = WIKITEXT,
    wikitext: Annotated[
        bool, Option("--wikitext", help="TEXT is WikiText's raw file: join its lines as the data set's rows.")
    ] = False,
    seqlen: Annotated[
        int | None, Option("--seqlen", min=2, help="Tokens in a window.  Default: 2048, or the context.")
    ] = None,
    windows: Annotated[
        int | None, Option("--windows", min=1, help="Stop after this many.  Default: the whole text.")
    ] = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Measure a model: perplexity; with --against also KL divergence and agreement with the original.

    Example:  llmq eval out/ --against Qwen/Qwen3-8B --text held-out.txt
    """
    from llmq.measure import measure

    quiet_transformers()
    result = measure(
        path,
        against,
        text,
        wikitext=wikitext,
        seqlen=seqlen,
        limit=windows,
        device=device,
        remote_code=trust_remote_code,
    )
    if json:
        print_json(result.to_dict())
        return
    columns = ("model", "size", "bits/weight", "perplexity", "KL mean", "KL median", "KL 99 %", "same top-1")
    rows = [_row(path, result.model, result.size)]
    if result.original is not None and result.original_size is not None:
        rows.insert(0, _row(str(against), result.original, result.original_size))
    print_table(f"{text}, {result.model.tokens} predicted tokens", columns, rows)


def _row(name: str, figures: Any, size: Any) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        name,
        megabytes(size.file_bytes),
        number(size.bits_per_weight, ".3f"),
        number(figures.perplexity, ".4f"),
        number(figures.kl_mean, ".5f"),
        number(figures.kl_median, ".5f"),
        number(figures.kl_99, ".4f"),
        number(figures.same_top_1, ".2%"),
    )
