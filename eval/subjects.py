"""The models of the experiments, each with its calibration text and its evaluation text."""

import datetime
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BUNDLED = ROOT / "eval" / "models"
SAMPLES, SEQLEN, WINDOWS = 128, 256, 64

sys.path.insert(0, str(ROOT / "scripts"))
from stdlib_text import write_texts  # noqa: E402

# The text of the bundled models is the standard library, with separate evaluation files. The text of babyllama is
# stories; model and texts are expected in a folder `shared` next to the checkout, and are not published.
MODELS = {
    "tiny-python-llama": BUNDLED / "tiny-python-llama",
    "tiny-python-qwen3": BUNDLED / "tiny-python-qwen3",
    "babyllama-tok361-pad384": SHARED / "models" / "babyllama-tok361-pad384",
}


def folder_of(model: str) -> Path:
    """The folder of one of `MODELS`; ends the program with an error if it is absent."""
    return _present(MODELS[model], model)


def texts(model: str, folder: Path) -> tuple[Path, Path]:
    """Calibration and evaluation text for a model; generated texts are written to `folder`."""
    if MODELS[model].parent == BUNDLED:
        return write_texts(folder)
    calibration, evaluation = (SHARED / "data" / f"tinystories.{part}.jsonl" for part in ("calib", "eval"))
    return _present(calibration, model), _present(evaluation, model)


def _present(path: Path, model: str) -> Path:
    if not path.exists():
        bundled = [name for name, folder in MODELS.items() if folder.parent == BUNDLED]
        raise SystemExit(
            f"error: {path} does not exist, but {model} needs it; it is not part of this repository\n"
            f"try:   --model or --models with a bundled model: {', '.join(bundled)}"
        )
    return path


def stamp() -> dict[str, str]:
    """Date, commit, versions and hardware of a measurement."""
    import transformers

    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, "
        + torch.backends.cpu.get_cpu_capability(),
    }


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
