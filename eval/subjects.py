"""The models that are measured, with the text that each is calibrated on and the text that it is judged by."""

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

# The bundled ones read the standard library, its evaluation files kept apart by rule.  babyllama reads stories; model
# and texts are expected in a folder `shared` next to the checkout, and are not published with it.
MODELS = {
    "tiny-python-llama": BUNDLED / "tiny-python-llama",
    "tiny-python-qwen3": BUNDLED / "tiny-python-qwen3",
    "babyllama-tok361-pad384": SHARED / "models" / "babyllama-tok361-pad384",
}


def folder_of(model: str) -> Path:
    """The folder of one of `MODELS`; ends the program with a message where it is absent."""
    return _present(MODELS[model], model)


def texts(model: str, folder: Path) -> tuple[Path, Path]:
    """Calibration and evaluation text for a model; `folder` is for what has to be written."""
    if MODELS[model].parent == BUNDLED:
        return write_texts(folder)
    calibration, evaluation = (SHARED / "data" / f"tinystories.{part}.jsonl" for part in ("calib", "eval"))
    return _present(calibration, model), _present(evaluation, model)


def _present(path: Path, model: str) -> Path:
    if not path.exists():
        bundled = [name for name, folder in MODELS.items() if folder.parent == BUNDLED]
        raise SystemExit(
            f"error: {path} does not exist, and {model} is measured with it; it is not part of this repository\n"
            f"try:   --model or --models with a bundled model: {', '.join(bundled)}"
        )
    return path


def stamp() -> dict[str, str]:
    """When and with what figures were made."""
    import transformers

    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, check=False)
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
