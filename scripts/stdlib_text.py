"""Text that every Python installation has: the sources and docstrings of its standard library.

    python scripts/stdlib_text.py FOLDER     write FOLDER/calibration.jsonl and FOLDER/held_out.txt

The bundled model is trained on it, and the demo calibrates and evaluates with it, so neither needs a download.

A fixed rule selects the evaluation text: if the SHA-256 of the path relative to the library starts with a byte
below 26 (one file in ten), the file is never used for training or calibration. The rule does not depend on the machine.
The text of a file changes slightly between Python versions.
"""

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

HELD_OUT_BELOW = 26  # of 256
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "__pycache__",
    "turtledemo",
}


def is_held_out(relative_path: str) -> bool:
    """Whether the file belongs to the evaluation text; `relative_path` in POSIX form, such as `json/decoder.py`."""
    return hashlib.sha256(relative_path.encode()).digest()[0] < HELD_OUT_BELOW


def documents(*, held_out: bool) -> list[str]:
    """The texts of one part of the split, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or is_held_out(relative.as_posix()) != held_out:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").strip()
        if len(text) > 200:
            texts.append(text)
    return texts


def write_texts(folder: Path, *, evaluation_characters: int = 400_000) -> tuple[Path, Path]:
    """Write `calibration.jsonl` (one document per line) and `held_out.txt`; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = folder / "calibration.jsonl", folder / "held_out.txt"
    lines = (json.dumps({"text": text}) for text in documents(held_out=False))
    calibration.write_text("\n".join(lines) + "\n", encoding="utf-8")
    held_out.write_text("\n\n".join(documents(held_out=True))[:evaluation_characters], encoding="utf-8")
    return calibration, held_out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for written in write_texts(parser.parse_args().folder):
        print(written)
