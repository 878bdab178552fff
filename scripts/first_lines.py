"""Measure the time until the first line of every command, and write docs/FIRST_LINES.json.

    python scripts/first_lines.py FOLDER --python PYTHON

FOLDER holds `out`, a finished model, `model`, its original, and `text.txt`. A cold start reads all files from the disk
again: they are removed from the file cache of the system before. Each time is the median of several starts.
"""

import argparse
import json
import os
import pty
import re
import select
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "FIRST_LINES.json"
WARM, COLD = 5, 2  # starts
COMMANDS = """
quantize model new
plan model
sensitivity model
train model new --data text.txt
merge model out new
convert out new --to gptq
push out owner/name --dry-run
report out
eval out
verify out
inspect out
env
generate out --prompt x
chat out
serve out --print
bench out
"""

IMPORTED = """
import json, sys
import llmq.cli, typer.rich_utils
llmq.cli.Commands().list_commands(None)
sources = [getattr(module, "__file__", None) for module in sys.modules.values()]
compiled = [getattr(module, "__cached__", None) for module in sys.modules.values()]
print(json.dumps([name for name in (*sources, *compiled) if name]))
"""


def first_line(words: list[str], folder: Path, python: Path) -> tuple[float, float, str]:
    """Seconds until the first output, CPU seconds until then, and the output."""
    ours, theirs = pty.openpty()
    start = time.monotonic()
    process = subprocess.Popen([str(python), "-m", "llmq", *words], cwd=folder, stdin=theirs, stdout=theirs,
                               stderr=theirs)  # fmt: skip
    os.close(theirs)
    select.select([ours], [], [])
    passed, text = time.monotonic() - start, os.read(ours, 200).decode()
    fields = Path(f"/proc/{process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    process.kill()
    process.wait()
    os.close(ours)
    return passed, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), text


def imported(python: Path) -> list[Path]:
    """The files that `llmq --help` imports, which are those until the first line, and a few more."""
    done = subprocess.run([python, "-c", IMPORTED], capture_output=True, text=True, check=True)
    return [file for name in json.loads(done.stdout) if (file := Path(name)).is_file()]


def forget(files: list[Path]) -> None:
    """Remove these files from the file cache."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    given = parser.parse_args()
    files, rows = imported(given.python), []
    for words in filter(None, map(str.split, COMMANDS.splitlines())):
        warm = [first_line(words, given.folder, given.python) for _ in range(WARM)]
        cold = []
        for _ in range(COLD):
            forget(files)
            cold.append(first_line(words, given.folder, given.python)[0])
        row = {
            "command": words[0], "line": re.sub(r"\x1b\[\d+m", "", warm[0][2].splitlines()[0]),
            "seconds": round(statistics.median(seconds for seconds, *_ in warm), 2),
            "cpu_seconds": round(statistics.median(cpu for _, cpu, _ in warm), 2),
            "slowest": round(max(seconds for seconds, *_ in warm), 2),
            "cold": round(statistics.median(cold), 2),
        }  # fmt: skip
        rows.append(row)
        print(row, file=sys.stderr)
    record = {"date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count(),
              "load": round(os.getloadavg()[0], 1), "commands": rows}  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
