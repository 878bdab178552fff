"""Write docs/MODELS.md: what becomes of a tiny random model of every architecture in tests/architectures.py.

    python scripts/architectures.py [JOBS]

It takes a few minutes on one core; JOBS are that many processes.  `tests/e2e/test_architectures.py` asks the same of
each of them.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "MODELS.md"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # this checkout, and the tests' builders with it

import transformers  # noqa: E402

from llmq.report.record import OUTSIDE_THE_BLOCKS  # noqa: E402
from tests import builders  # noqa: E402
from tests.architectures import DENSE, EXPERTS, HYBRID, LEFT_OUT, VISION, Outcome, counted, examine  # noqa: E402

HEAD = """\
# Architectures

Written by `scripts/architectures.py`: each row is a tiny model with random weights, quantized with GPTQ, saved, loaded
again and run.  No line of llmq names any of these; `tests/e2e/test_architectures.py` asks the same of every one.

* **layers**: how many linear layers were packed, of how many blocks; an expert's count one by one.
* **left**: matrices inside the blocks that stay as they are, with the reason.  Outside of the blocks embeddings, heads
  (`--quantize-head` takes those, too) and pictures' encoders always stay.
* **loads**: `llmq.load` gives the logits of the float model with the same weights: ‖difference‖ / ‖logits‖.
* **in blocks**: the float model read block by block, as quantizing and measuring do, against the model as a whole.

Every one of these models makes {worst:.0e} or less of each.
"""
SECTIONS = {
    "Dense": (
        DENSE,
        "Linear layers and GPT-2's Conv1D, q, k, v and gate, up in one weight or apart, norms of all kinds.",
    ),
    "Hybrids and recurrent models": (
        HYBRID,
        "Linear layers are quantized; convolutions, and the parameters of state spaces, stay.",
    ),
    "Mixtures of experts": (EXPERTS, "Every expert is quantized by itself; routers and gates stay."),
    "Models that see pictures": (VISION, "The part that reads text is quantized, on text; the rest stays."),
}
COLUMNS = "| architecture | class | layers | left, and why | loads | in blocks |\n|---|---|---:|---|---:|---:|"


def row(name: str, outcome: Outcome) -> str:
    """One line of a table."""
    inside = {layer: reason for layer, reason in outcome.left.items() if reason != OUTSIDE_THE_BLOCKS}
    by_reason: dict[str, list[str]] = {}
    for (layer, reason), _ in sorted(counted(inside).items()):
        short = layer.rpartition(".N.")[2]
        by_reason.setdefault(reason, []).append(f"`{short}`")
    left = "; ".join(f"{', '.join(sorted(set(layers)))}: {reason}" for reason, layers in by_reason.items())
    figures = [outcome.difference, outcome.replayed]
    loads, blocks = ("as a whole" if figure is None else _figure(figure) for figure in figures)
    return (
        f"| `{name}` | {outcome.model_class} | {len(outcome.packed)} of {outcome.blocks} blocks | {left or '–'} "
        f"| {loads} | {blocks} |"
    )


def page(outcomes: Mapping[str, Outcome]) -> str:
    """The document."""
    figures = [figure or 0.0 for each in outcomes.values() for figure in (each.difference, each.replayed)]
    parts = [HEAD.format(worst=max(figures))]
    for title, (names, text) in SECTIONS.items():
        rows = "\n".join(row(name, outcomes[name]) for name in names)
        parts.append(f"## {title}\n\n{text}\n\n{COLUMNS}\n{rows}\n")
    left_out = "\n".join(f"| `{name}` | {reason} |" for name, reason in LEFT_OUT.items())
    parts.append(f"## Not covered\n\n| architecture | why |\n|---|---|\n{left_out}\n")
    return "\n".join(parts)


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def main() -> None:
    names = [name for section, _ in SECTIONS.values() for name in section]
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        outcomes = {}
        for name, outcome in zip(names, pool.map(examined, names), strict=True):
            outcomes[name] = outcome
            print(row(name, outcome), flush=True)
    PAGE.write_text(page(outcomes), encoding="utf-8")


def examined(name: str) -> Outcome:
    """One architecture in a folder of its own."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        (work := Path(folder) / "work").mkdir()
        return examine(name, work, builders.write_text(Path(folder) / "text.txt"))


if __name__ == "__main__":
    main()
