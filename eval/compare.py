"""Several quantized models against one original: a table for each text and one for all, or JSON.

    python eval/compare.py ORIGINAL QUANTIZED… --text FILE [--text FILE…] [--seqlen 2048] [--windows 64] [--json]

The original runs once, and of the models one block at a time is in memory.
"""

import argparse
from pathlib import Path

from llmq.cli.eval import number
from llmq.cli.terminal import print_json, print_notes, print_table, quiet_transformers
from llmq.evaluation.measure import Figures, Measurement, measure_many

COLUMNS = (
    "model", "bits/weight", "perplexity", "ratio", "KL mean", "95 %", "KL median", "KL 99 %", "KL 99.9 %",
    "same top-1", "RMS Δp",
)  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("original")
parser.add_argument("quantized", nargs="+")
parser.add_argument("--text", required=True, action="append")
parser.add_argument("--seqlen", type=int)
parser.add_argument("--windows", type=int)
parser.add_argument("--device", default="auto")
parser.add_argument("--json", action="store_true")


def row(path: str, measured: Measurement, figures: Figures) -> tuple[str, ...]:
    model = figures.model
    around = model.kl_mean_interval
    return (
        path,
        number(measured.size.bits_per_weight, ".3f"),
        number(model.perplexity, ".4f"),
        number(model.perplexity_ratio, ".4f"),
        number(model.kl_mean, ".5f"),
        "-" if around is None else f"{around[0]:.5f}–{around[1]:.5f}",
        number(model.kl_median, ".5f"),
        number(model.kl_99, ".4f"),
        number(model.kl_999, ".4f"),
        number(model.same_top_1, ".2%"),
        number(model.rms_dp, ".2%"),
    )


def print_text(original: str, found: dict[str, Measurement], text: int | None) -> None:
    """The table of one text by its position, or of all together."""
    of = {path: each.total if text is None else each.texts[text] for path, each in found.items()}
    figures = next(iter(of.values()))
    assert figures.original is not None, "measured against the original"
    first = (original, "-", f"{figures.original.perplexity:.4f}", *("-" * (len(COLUMNS) - 3)))
    print_table(Path(figures.text).name, COLUMNS, [first, *(row(path, found[path], of[path]) for path in found)])


if __name__ == "__main__":
    arguments = parser.parse_args()
    quiet_transformers()
    measured = measure_many(
        arguments.original, arguments.quantized, arguments.text,
        seqlen=arguments.seqlen, limit=arguments.windows, device=arguments.device,
    )  # fmt: skip
    found = dict(zip(arguments.quantized, measured, strict=True))
    if arguments.json:
        print_json({path: each.to_dict() for path, each in found.items()})
    else:
        texts = len(measured[0].texts)
        for text in [*range(texts), None] if texts > 1 else [None]:
            print_text(arguments.original, found, text)
    print_notes(dict.fromkeys(note for each in measured for note in each.notes))
