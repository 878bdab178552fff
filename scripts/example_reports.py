"""Make the reports that scripts/check_report.sh opens, from the root: python scripts/example_reports.py FOLDER

dense/report.html is that of the bundled model with `fast`, mixture/report.html that of a tiny mixture of experts, and
unfinished/report.html that of the same run after its first block.
"""

import shutil
import sys
from pathlib import Path

from stdlib_text import write_texts

ROOT = Path(__file__).resolve().parents[1]
MODEL = "eval/models/tiny-python-llama"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import llmq
    from llmq.checkpoint.staging import STAGING
    from tests import builders, mixtures, runs

    folder = Path(sys.argv[1])
    for name in ("dense", "mixture", "unfinished", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    text, _ = write_texts(folder / "text")
    llmq.quantize(
        MODEL, folder / "dense", method="fast", calibration=[str(text)], samples=32, seqlen=128, validate=8,
        device="cpu",
    )  # fmt: skip
    mixture = builders.save_model(folder / "model", builders.causal_model(mixtures.mixtral()))
    runs.quantize(mixture, folder / "mixture", text, method="gptq", samples=24, validate=8)
    runs.stop_in_block(runs.job(mixture, folder / "stopped", text, method="gptq"), 1)
    (folder / "stopped" / STAGING).rename(folder / "unfinished")
    (folder / "stopped").rmdir()


if __name__ == "__main__":
    main()
