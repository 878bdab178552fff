"""The models of the experiments, each with its calibration text and its evaluation text."""

import datetime
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BUNDLED = ROOT / "eval" / "models"
YARDSTICK = ROOT / ".yardstick"  # made by `yardstick.py` and `finetune.py`
SAMPLES, SEQLEN, WINDOWS = 128, 256, 64

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "eval")]
from stdlib_text import write_texts  # noqa: E402
from strata import CALIBRATION, STRATA  # noqa: E402


@dataclass(frozen=True)
class Protocol:
    """How a model is compared: calibration and evaluation sequences (evaluation: of each text), and the group size."""

    samples: int = SAMPLES
    seqlen: int = SEQLEN
    windows: int = WINDOWS
    group_size: int = 128


# The text of the bundled models is the standard library, with separate evaluation files. The text of babyllama is
# stories; model and texts are expected in a folder `shared` next to the checkout, and are not published.
# SmolLM2 and its texts are made by `yardstick.py`; it has 576 columns, so the group size is 64.
MODELS = {
    "tiny-python-llama": BUNDLED / "tiny-python-llama",
    "tiny-python-qwen3": BUNDLED / "tiny-python-qwen3",
    "babyllama-tok361-pad384": SHARED / "models" / "babyllama-tok361-pad384",
    "smollm2": YARDSTICK / "smollm2",
    "smollm2-tuned": YARDSTICK / "smollm2-tuned",
}

DOMAINS = {  # in addition to the domain of a model
    "wikipedia": SHARED / "data" / "wikitext2-raw.test.txt",
    "stories": SHARED / "data" / "tinystories.eval.jsonl",
    "web": SHARED / "data" / "exllamav3_c4.utf8",
}


def is_yardstick(model: str) -> bool:
    """Whether `yardstick.py` or `finetune.py` makes the model."""
    return MODELS[model].parent == YARDSTICK


def protocol(model: str) -> Protocol:
    """How one of `MODELS` is compared."""
    return Protocol(samples=64, seqlen=512, windows=12, group_size=64) if is_yardstick(model) else Protocol()


def folder_of(model: str, yardstick: Path = YARDSTICK) -> Path:
    """The folder of one of `MODELS`; ends the program with an error if it is absent."""
    return _present(yardstick / model if is_yardstick(model) else MODELS[model], model)


def strata(yardstick: Path = YARDSTICK) -> tuple[Path, list[Path]]:
    """Calibration text, and the evaluation texts for SmolLM2, on which nothing was fitted."""
    text = yardstick / "text"
    return _present(text / CALIBRATION, "smollm2"), [_present(text / f"{name}.jsonl", name) for name in STRATA]


def texts(model: str, folder: Path) -> tuple[Path, Path]:
    """Calibration and evaluation text for a model; generated texts are written to `folder`.

    Of the texts for SmolLM2 (`strata`), the evaluation text is the first one.
    """
    if MODELS[model].parent == BUNDLED:
        return write_texts(folder)
    if is_yardstick(model):
        calibration, (first, *_) = strata()
        return calibration, first
    calibration, evaluation = (SHARED / "data" / f"tinystories.{part}.jsonl" for part in ("calib", "eval"))
    return _present(calibration, model), _present(evaluation, model)


def other_domains(evaluation: Path, scratch: Path) -> dict[str, Path]:
    """Two texts of other domains than the evaluation text, by name; fewer where they are absent."""
    others = {name: file for name, file in DOMAINS.items() if file != evaluation and file.exists()}
    return {name: _as_text(file, scratch) for name, file in list(others.items())[:2]}


def _as_text(file: Path, scratch: Path) -> Path:
    """The file, copied to a name that ends in .txt if necessary."""
    if file.suffix != ".utf8":
        return file
    copy = scratch / f"{file.stem}.txt"
    copy.write_bytes(file.read_bytes())
    return copy


def _present(path: Path, model: str) -> Path:
    if not path.exists():
        bundled = [name for name, folder in MODELS.items() if folder.parent == BUNDLED]
        raise SystemExit(
            f"error: {path} does not exist, but {model} needs it; it is not part of this repository\n"
            f"try:   --model or --models with a bundled model: {', '.join(bundled)}; "
            "`python eval/yardstick.py` makes smollm2, and then `python eval/finetune.py` smollm2-tuned"
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
